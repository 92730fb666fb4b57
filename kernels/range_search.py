"""Range search: float groups and what is searched for in, scales and zero points out; native where it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpass.kernels.cpu import x86_ranges
from qpass.kernels.reference.range_search import RangeSearch
from qpass.kernels.reference.range_search import search_ranges as reference

if TYPE_CHECKING:
    from torch import Tensor


def search_ranges(w: Tensor, importance: Tensor | None, search: RangeSearch) -> tuple[Tensor, Tensor | None]:
    """w float32 [N, G, S] -> scale and zero point [N, G]; see qpass.kernels.reference.range_search."""
    run = x86_ranges.search_ranges if x86_ranges.refuses(w) is None else reference
    return run(w, importance, search)
