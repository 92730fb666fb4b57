"""CUDA kernels: Triton programs, how weights are packed for them, and their registration; no GPU or Triton at import."""
