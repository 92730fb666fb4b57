"""Lowering: passes from Inductor's graph to kernels; graph in, graph out."""

if __name__ != "qpass.lowering":
    raise ImportError(f"this folder is the package qpass.lowering and was imported as {__name__!r}; install qpass "
                      "(pip install -e .) and import qpass.lowering")
