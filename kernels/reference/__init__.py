"""Reference kernels: plain torch; the definition of every op, the fallback on every device, and the oracle in tests."""
