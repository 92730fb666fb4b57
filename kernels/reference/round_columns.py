"""Round columns: columns of a weight, as rows, in; each rounded with what those before it have left, out.

Row i of a tensor [B, N] here is a column of a weight [N, B]: each step then reads and writes memory in one piece. What
the columns of a block add to each other is gathered when one's turn comes: half the memory traffic of spreading each at
once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def round_columns(w: Tensor, scale: Tensor, zero: Tensor | None, within: Tensor, ends: tuple[int, int]
                  ) -> tuple[Tensor, Tensor]:
    """Codes and errors [B, N] of w [B, N], all float32: for i = 0, 1, ...

        v = w_i - sum over j < i of within_ij error_j,    q_i = clamp(round(v / scale_i) + zero_i, *ends),
        error_i = v - (q_i - zero_i) scale_i

    `zero` None is 0. Overwrites w.
    """
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for i, (column, q, step, error, above) in enumerate(zip(w, codes, scale, errors, within, strict=True)):
        if i:
            torch.addmv(column, errors[:i].t(), above[:i], alpha=-1, out=column)
        torch.div(column, step, out=q).round_()
        if zero is None:
            torch.addcmul(column, q.clamp_(*ends), step, value=-1, out=error)
        else:
            q.add_(zero[i]).clamp_(*ends)
            torch.addcmul(column, q - zero[i], step, value=-1, out=error)
    return codes, errors


def descend_columns(slope: Tensor, codes: Tensor, scale: Tensor, inside: Tensor, rates: Tensor, ends: tuple[int, int]
                    ) -> tuple[Tensor, Tensor]:
    """Codes moved and their steps [B, N], all float32: for i = 0, 1, ...

        s = slope_i + sum over j < i of inside_ij step_j,    q_i = clamp(round(codes_i + rates_i s / scale_i), *ends),
        step_i = (q_i - codes_i) scale_i

    Overwrites slope.
    """
    moved, steps = torch.empty_like(slope), torch.empty_like(slope)
    places = zip(slope, codes, scale, moved, steps, inside, rates.tolist(), strict=True)
    for i, (own, before, size, after, step, beside, rate) in enumerate(places):
        if i:
            torch.addmv(own, steps[:i].t(), beside[:i], out=own)
        torch.addcdiv(before, own, size, value=rate, out=after).round_().clamp_(*ends)
        torch.sub(after, before, out=step).mul_(size)
    return moved, steps
