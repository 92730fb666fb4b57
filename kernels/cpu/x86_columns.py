"""Round columns on x86: what the native code refuses, and its calls through the C ABI.

Sums over columns are taken in another order than in the reference, so where a weight lies half-way between two integers
either may be chosen, and those after it follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qpass.kernels.cpu import native
from qpass.kernels.isa import machine_refuses

if TYPE_CHECKING:
    from torch import Tensor


def refuses(w: Tensor) -> str | None:
    """Why the native code does not round these columns [B, N], or None."""
    if w.device.type != "cpu" or w.dtype is not torch.float32 or w.numel() == 0:
        return f"takes float32 on the CPU, and some; got {w.dtype} on {w.device}, {w.numel()} numbers"
    return machine_refuses("x86_64") or native.prepare("calibration")


def round_columns(w: Tensor, scale: Tensor, zero: Tensor | None, within: Tensor, ends: tuple[int, int]
                  ) -> tuple[Tensor, Tensor]:
    """As the reference; w stays as it is."""
    given = [None if x is None else x.float().contiguous() for x in (w, scale, zero, within)]
    return _run("qp_round_columns", given, w, ends)


def descend_columns(slope: Tensor, codes: Tensor, scale: Tensor, inside: Tensor, rates: Tensor, ends: tuple[int, int]
                    ) -> tuple[Tensor, Tensor]:
    """As the reference; slope stays as it is."""
    given = [x.float().contiguous() for x in (slope, codes, scale, inside, rates)]
    return _run("qp_descend_columns", given, slope, ends)


def _run(name: str, given: Sequence[Tensor | None], like: Tensor, ends: tuple[int, int]) -> tuple[Tensor, Tensor]:
    count, n = like.shape
    if any(x is not None and x.shape not in ((count, n), (count, count), (count,)) for x in given):
        raise ValueError(f"{name}: tensors that do not fit columns of {count} x {n}")
    rounded, left = torch.empty(count, n), torch.empty(count, n)
    native.succeed(getattr(native.library("calibration"), name)(
        *(None if x is None else x.data_ptr() for x in given), count, n, *map(float, ends), rounded.data_ptr(),
        left.data_ptr(), torch.get_num_threads()), "calibration")
    return rounded, left
