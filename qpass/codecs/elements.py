"""Elements: float values of 4 and 6 bits to their codes and back, and codes to packed bytes and back.

Source: OCP Microscaling Formats 1.0, section 5.3. A code is sign, exponent and mantissa from the highest bit down;
none of these formats has infinities or NaN. Rounding is to nearest, ties to the even mantissa, too large saturates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

E2M1, E3M2, E2M3 = (2, 1), (3, 2), (2, 3)  # exponent bits, mantissa bits


@lru_cache(maxsize=8)
def magnitudes(element: tuple[int, int]) -> tuple[float, ...]:
    """The values of the non-negative codes in order: 0, 0.5, 1, 1.5, 2, 3, 4, 6 for E2M1."""
    exponent_bits, mantissa_bits = element
    bias = (1 << exponent_bits - 1) - 1
    found = []
    for code in range(1 << exponent_bits + mantissa_bits):
        exponent, mantissa = code >> mantissa_bits, code & (1 << mantissa_bits) - 1
        fraction = mantissa / (1 << mantissa_bits)
        found.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return tuple(found)


def values(element: tuple[int, int], device: torch.device | str) -> Tensor:
    """float32 value of every code, the negative ones last."""
    table = torch.tensor(magnitudes(element), dtype=torch.float32, device=device)
    return torch.cat([table, -table])


def to_codes(x: Tensor, element: tuple[int, int]) -> Tensor:
    """x float32 of any shape -> codes uint8 of the nearest values; -0.0 keeps its sign, NaN is the largest."""
    exponent_bits, mantissa_bits = element
    bias, dropped = (1 << exponent_bits - 1) - 1, 23 - mantissa_bits
    largest = magnitudes(element)[-1]
    size = x.abs()
    size = torch.where(size < largest, size, largest)
    # A float32 rounded to the element's mantissa has its exponent and mantissa side by side, as a code has them.
    bits = size.view(torch.int32)
    normal = (bits + ((1 << dropped - 1) - 1) + (bits >> dropped & 1) >> dropped) - (127 - bias << mantissa_bits)
    subnormal = (size * 2.0 ** (bias - 1 + mantissa_bits)).round().int()
    code = torch.where(size < 2.0 ** (1 - bias), subnormal, normal)
    return (code + (torch.signbit(x).int() << sum(element))).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes below 16, [..., K] with K even -> uint8 [..., K / 2], the even element in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of pack_nibbles."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def pack_sixes(codes: Tensor) -> Tensor:
    """uint8 codes below 64, [..., K] with K % 4 == 0 -> uint8 [..., 3 K / 4], a stream of bits from the low end."""
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], dim=-1).flatten(-2)


def unpack_sixes(packed: Tensor) -> Tensor:
    """The inverse of pack_sixes."""
    x, y, z = packed.unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([x & 63, (x >> 6 | y << 2) & 63, (y >> 4 | z << 4) & 63, z >> 2], dim=-1).flatten(-2)
