"""Lane: what a library gives to be timed: one weight many times over, calls on it, and the outputs they must give.

Imports numpy and nothing of the libraries, for each runs in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Call = Callable[[Any], Any]

SMALL = 16
"""Up to so many tokens a call is limited by reading the weights, so that they must come from memory."""
FEW = 4
"""Copies of the weights in use above that."""
ROWS_CHECKED = 16


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One variant of one library at one set of weights.

    calls(m)     one call for each copy of the weights, for m tokens; made by the library for that m if need be
    take(x)      float32 [M, K] to what a call takes
    give(y, r)   the rows r of what a call returned: float32 [len(r), N] for each product that it holds
    weight       float32 [N, K] as the library holds it: its own codes and scales, multiplied out
    nbytes       bytes of one copy, as one product reads them
    tolerance    bound of |y - x @ weight.T| / |x @ weight.T|, Frobenius
    together     products in one call: 1, or more where a library can only be asked for a whole graph
    """

    calls: Callable[[int], Sequence[Call]]
    take: Callable[[Floats], Any]
    give: Callable[[Any, Sequence[int]], Sequence[Floats]]
    weight: Floats
    nbytes: float
    tolerance: float
    together: Callable[[int], int] = lambda m: 1


ROUNDED_INPUT = 0.03
"""Tolerance where the input is rounded to int8: about 0.01 for normal numbers, whatever the grouping."""
FLOAT_INPUT = 0.01
"""Tolerance where it is not: the rounding of inputs and outputs to bfloat16."""


def copies_for(nbytes: float, rotate: int) -> int:
    """How many copies it takes to fill `rotate` bytes; at least FEW."""
    return max(FEW, -(-rotate // max(int(nbytes), 1)))


def few_or_all(calls: Sequence[Call]) -> Callable[[int], Sequence[Call]]:
    """`Lane.calls` of a library whose calls take any number of tokens."""
    return lambda m: calls if m <= SMALL else calls[:FEW]


@lru_cache(maxsize=1)
def draw_weight(n: int, k: int) -> Floats:
    """The same normal numbers in every process, of the size that a layer's weights have; not to be written to."""
    draw = np.random.default_rng(n * 31 + k)
    return np.asarray(draw.standard_normal((n, k), dtype=np.float32) * np.float32(k**-0.5))


def draw_input(m: int, k: int) -> Floats:
    """The same input in every process."""
    return np.random.default_rng(m * 7919 + k).standard_normal((m, k), dtype=np.float32)


def rows_checked(m: int) -> list[int]:
    """Rows of an output that are compared, first and last among them."""
    return sorted({round(i * (m - 1) / max(1, min(m, ROWS_CHECKED) - 1)) for i in range(min(m, ROWS_CHECKED))})


def round_to_nearest(weight: Floats, bits: int, group: int) -> tuple[NDArray[np.int8], Floats]:
    """Symmetric codes [N, K] and scales [N, K / group], the scales already those that float16 and bfloat16 can hold."""
    n, k = weight.shape
    grouped = weight.reshape(n, k // group, group)
    scale = np.abs(grouped).max(-1) / (2 ** (bits - 1) - 0.5)
    scale = ((scale.astype(np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
    codes = np.clip(np.rint(grouped / scale[..., None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.astype(np.int8).reshape(n, k), scale


def multiplied_out(codes: NDArray[Any], scale: Floats) -> Floats:
    """codes [N, K] times scales [N, G]: the weight that they stand for."""
    n, k = codes.shape
    return np.asarray((codes.reshape(n, scale.shape[1], -1).astype(np.float32) * scale[..., None]).reshape(n, k))
