"""Experts' rows: an ExpertsSite and its parameters in, each expert's weights gate rows first out, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qpass.experts_site import ExpertsSite
from qpass.kernels.experts_choice import pack_blocks
from qpass.kernels.layout import Packed
from qpass.kernels.reference.experts import apply_gate
from qpass.kernels.registry import kernel
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight


def define(site: ExpertsSite, stored: Mapping[str, Tensor], x: Tensor, index: Tensor | None, weight: Tensor | None
           ) -> Tensor | None:
    """What `site` says its module computes, one expert after the other; `stored` are its parameters by leaf.

    None if the shapes cannot be those of this form.
    """
    if x.shape[-1] != site.hidden:
        return None
    rows = x.reshape(-1, site.hidden)
    if site.form == "sorted":
        if rows.shape[0] % site.experts:
            return None
        index = torch.arange(site.experts).repeat_interleave(rows.shape[0] // site.experts).view(-1, 1)
        weight = torch.ones_like(index, dtype=x.dtype)
    elif site.form == "scored":
        assert weight is not None
        if weight.shape[-1] != site.experts:
            return None
        weight = weight.reshape(-1, site.experts)
        index = torch.arange(site.experts).expand(weight.shape)
    assert index is not None and weight is not None
    index, weight = index.reshape(-1, index.shape[-1]), weight.reshape(-1, weight.shape[-1])
    if index.shape[0] != rows.shape[0]:
        return None
    total = torch.zeros_like(rows)
    for expert in range(site.experts):
        share = (weight * (index == expert)).sum(-1, keepdim=True)
        chosen = share.squeeze(-1).nonzero().squeeze(-1)
        if chosen.numel() == 0:
            continue
        y = rows[chosen] @ first_of(site, stored, expert).t()
        if site.first_bias is not None:
            y = y + first_of(site, stored, expert, bias=True)
        down = stored[site.second][expert]
        z = apply_gate(y, site.gate) @ (down if site.transposed[1] else down.t())
        if site.second_bias is not None:
            z = z + stored[site.second_bias][expert]
        total[chosen] += share[chosen] * z
    return total


def first_of(site: ExpertsSite, stored: Mapping[str, Tensor], expert: int, *, bias: bool = False) -> Tensor:
    """One expert's first weight [2I, K] (or its bias [2I]), gate rows first, then up rows; [I, K] without a gate."""
    leaves = site.first_bias if bias else site.first
    assert leaves is not None
    parts = [stored[leaf][expert] for leaf in leaves]
    if site.transposed[0] and not bias:
        parts = [part.t() for part in parts]
    return gate_first(site, parts)


def gate_first(site: ExpertsSite, parts: Sequence[Tensor]) -> Tensor:
    """Rows as the model stores them, in the order gate, up."""
    if site.rows == "alternating":
        parts = [parts[0][0::2], parts[0][1::2]]
    elif site.rows == "one after the other":
        parts = list(parts[0].chunk(2))
    if site.up_first:
        parts = parts[::-1]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def as_stored(site: ExpertsSite, rows: Tensor) -> list[Tensor]:
    """The inverse of gate_first."""
    if site.rows == "single":
        return [rows]
    halves = list(rows.chunk(2))
    if site.rows == "apart":
        return halves
    if site.up_first:
        halves = halves[::-1]
    return [torch.cat(halves) if site.rows == "one after the other" else torch.stack(halves, 1).flatten(0, 1)]


def packed_part(part: LinearSpec | None, experts: int, weights: Iterator[CanonicalWeight | Packed | Tensor]
                ) -> dict[str, Tensor]:
    """One of the two weights of some experts, taken one at a time, as a block holds it; `part` None keeps floats."""
    if part is None:
        return {"weight": torch.stack([w for w in weights if isinstance(w, Tensor)])}
    packed = pack_blocks((w for w in weights if not isinstance(w, Tensor)), part, experts)
    return {name: packed[name] for name in kernel(part.kernel).layout.names(part)}
