"""Range search on x86: what the native code refuses, and its call through the C ABI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qpass.integer_scales import BIAS_WEIGHT
from qpass.kernels.cpu import native
from qpass.kernels.isa import machine_refuses

if TYPE_CHECKING:
    from torch import Tensor

    from qpass.kernels.reference.range_search import RangeSearch


def refuses(w: Tensor) -> str | None:
    """Why the native code does not search these groups [N, G, S], or None."""
    if w.device.type != "cpu" or w.dtype is not torch.float32 or w.numel() == 0:
        return f"takes float32 on the CPU, and some; got {w.dtype} on {w.device}, {w.numel()} numbers"
    return machine_refuses("x86_64") or native.prepare("calibration")


def search_ranges(w: Tensor, importance: Tensor | None, search: RangeSearch) -> tuple[Tensor, Tensor | None]:
    """As the reference, up to the order of sums: of two ranges that are alike to float32 either may be chosen."""
    w = w.contiguous()
    n, groups, size = w.shape
    scale, zero = torch.empty(n, groups), None if search.symmetric else torch.empty(n, groups)
    weights = None if importance is None else importance.float().contiguous()
    tried = torch.tensor(search.tried)
    native.succeed(native.library("calibration").qp_search_ranges(
        w.data_ptr(), w.numel(), n, groups, size, None if weights is None else weights.data_ptr(),
        0 if weights is None else weights.numel(), search.bits, int(search.symmetric), int(search.signed),
        int(search.compensated), BIAS_WEIGHT, tried.data_ptr(), tried.numel(), native.dtype_index()[search.dtype],
        scale.data_ptr(), None if zero is None else zero.data_ptr(), torch.get_num_threads()), "calibration")
    return scale, zero
