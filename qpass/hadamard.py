"""Hadamard: a tensor in, its last dim mixed in blocks by Sylvester's Hadamard matrix out, as plain products of two
small matrices, which a compiler sees through."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def sylvester(size: int) -> Tensor:
    """[size, size] of 1 and -1, float32, symmetric, for a power of two (Sylvester, 1867)."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def block_of(width: int) -> int:
    """The largest power of two that divides `width`."""
    return width & -width


def halves_of(size: int) -> tuple[Tensor, Tensor]:
    """Two Hadamard matrices whose Kronecker product is the one of `size`: each multiplies by about sqrt(size) numbers
    instead of `size`."""
    right = 1 << (size.bit_length() - 1) // 2
    return sylvester(size // right), sylvester(right)


def multiply_blocks(x: Tensor, size: int, halves: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x [..., K] with each block of `size` channels multiplied by H / sqrt(size), its own inverse; in float32, back in
    x's dtype. `halves` are `halves_of(size)` where x is."""
    left, right = halves_of(size) if halves is None else halves
    y = x.float().reshape(-1, len(left), len(right)) @ right.to(device=x.device, dtype=torch.float32)
    y = (y.transpose(1, 2) @ left.to(device=x.device, dtype=torch.float32)).transpose(1, 2)
    found: Tensor = y * size**-0.5
    return found.reshape(x.shape).to(x.dtype)
