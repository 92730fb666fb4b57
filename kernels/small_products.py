"""Small products: whether a float product of few outputs, as a router's, is better a compiler's loop than one call."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_WORK = 1 << 20
"""Multiplications. A library's product of 16-bit floats costs 30 to 100 us however small it is, and a loop on one core
about 60 for as many; see tests/bench/NOTES.md, "Mixtures of experts"."""
DTYPES = (torch.bfloat16, torch.float16)


def refuses_loop(x: Tensor, weight: Tensor) -> str | None:
    """Why `x` [M, K] times `weight` [N, K] transposed should stay one call; None if a loop is better.

    The tensors may be fake, their sizes symbols: no question is asked of a symbol.
    """
    if x.device.type != "cpu":
        return f"its device is {x.device.type}"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"it multiplies {x.dtype} and {weight.dtype}"
    sizes = (*x.shape, weight.shape[0])
    if not all(isinstance(size, int) for size in sizes):
        return "its sizes are not known when it is compiled"
    work = x.shape[0] * x.shape[1] * weight.shape[0]
    return None if work <= MOST_WORK else f"it takes {work} multiplications, more than {MOST_WORK}"


DECIDES = (refuses_loop,)
"""What decides it: a compiler's cache key holds their sources."""
