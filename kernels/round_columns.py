"""Round columns: columns of a weight, as rows, in; each rounded after those before it, out; native where it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpass.kernels.cpu import x86_columns
from qpass.kernels.reference import round_columns as reference

if TYPE_CHECKING:
    from torch import Tensor


def round_columns(w: Tensor, scale: Tensor, zero: Tensor | None, within: Tensor, ends: tuple[int, int]
                  ) -> tuple[Tensor, Tensor]:
    """See qpass.kernels.reference.round_columns.round_columns."""
    run = x86_columns.round_columns if x86_columns.refuses(w) is None else reference.round_columns
    return run(w, scale, zero, within, ends)


def descend_columns(slope: Tensor, codes: Tensor, scale: Tensor, inside: Tensor, rates: Tensor, ends: tuple[int, int]
                    ) -> tuple[Tensor, Tensor]:
    """See qpass.kernels.reference.round_columns.descend_columns."""
    run = x86_columns.descend_columns if x86_columns.refuses(slope) is None else reference.descend_columns
    return run(slope, codes, scale, inside, rates, ends)
