"""x86: registers the native kernels."""
