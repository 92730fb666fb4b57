"""Proven: of each CUDA kernel, the GPUs on which tests/bench/cuda.py compared it with the reference, and agreed.

Empty until it ran on one: then its last lines say what to write here. Nothing is entered that was not run.
"""

from __future__ import annotations

PROVEN: dict[str, tuple[str, ...]] = {}
