"""Kernels: code that computes an op on a device, the table of them, and how each wants its weights packed."""

if __name__ != "qpass.kernels":
    raise ImportError(f"this folder is the package qpass.kernels and was imported as {__name__!r}; install qpass "
                      "(pip install -e .) and import qpass.kernels")
