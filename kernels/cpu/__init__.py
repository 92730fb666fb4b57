"""CPU kernels: a native library in C++ and its registration; nothing is compiled before the first layer is packed."""
