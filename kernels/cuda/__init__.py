"""CUDA kernels: Triton programs, the packing of weights for them, and the table's entries; imports no Triton."""
