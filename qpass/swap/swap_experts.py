"""Swap experts: the decisions of one module of experts in, the module replaced by packed experts; and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qpass.decide.decide_experts import blocks_of, spec_of_block
from qpass.errors import WeightError
from qpass.experts_site import ExpertsSite
from qpass.find.experts_rows import as_stored, first_of
from qpass.kernels.experts_choice import choose_experts
from qpass.kernels.layout import Packed
from qpass.kernels.registry import ExpertsCall
from qpass.layers.experts_layer import QuantExperts, Weight
from qpass.spec import LinearSpec
from qpass.swap.module_places import put_everywhere
from qpass.swap.round_weight import quantized
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from qpass.decide.decision import Decision


def swap_experts(model: nn.Module, decisions: Sequence[Decision], device: torch.device | None = None,
                 found: Mapping[tuple[int, int], CanonicalWeight] | None = None) -> QuantExperts:
    """Quantize, pack and replace one module of experts, on `device` (by default where it is).

    `decisions` are those of all its weights, also of those that stay float; `found` are integers that calibration has
    found, by (0 for the first or 1 for the second weight, expert), and the others are rounded to nearest. Experts are
    quantized one at a time; until the packed layer is whole the model is untouched, then one assignment per place puts
    it in.
    """
    site, dtype = decisions[0].site.experts, decisions[0].site.dtype
    assert site is not None
    origin = model.get_submodule(site.owner)
    stored: dict[str, Tensor] = {}
    for leaf in site.parameters:
        parameter = origin._parameters.get(leaf)
        if parameter is None:
            raise WeightError(f"{site.owner}.{leaf} is gone from the model since the plan was made; plan again")
        stored[leaf] = parameter.detach()
    where = device or stored[site.second].device
    made = QuantExperts(site, origin, dtype)
    for parts, experts in blocks_of(site, decisions):
        spec, _ = choose_experts(ExpertsCall(spec=spec_of_block(site, parts, len(experts)), device=where, dtype=dtype,
                                             bias=site.first_bias is not None), where=site.owner, prepare=True)
        first, second = (quantized_experts(site, stored, experts, which, spec.parts[which], where, found or {})
                         for which in (0, 1))
        made.put_block(spec, experts, first, second)
    for leaf in site.parameters:
        origin._parameters[leaf] = nn.Parameter(stored[leaf].to("meta"), requires_grad=False)
    put_everywhere(model, origin, made)
    return made


def restore_experts(experts: QuantExperts) -> nn.Module:
    """The module that was replaced, its parameters as quantized, stored as it stores them."""
    site, origin = experts.site, experts.origin[0]
    rows: dict[str, list[Tensor]] = {leaf: [] for leaf in site.parameters}
    for expert in range(site.experts):
        for leaf, part in zip(site.first, as_stored(site, experts.dequantize(0, expert)), strict=True):
            rows[leaf].append(part.t() if site.transposed[0] else part)
        second = experts.dequantize(1, expert)
        rows[site.second].append(second.t() if site.transposed[1] else second)
    for leaf, parts in rows.items():
        origin._parameters[leaf] = nn.Parameter(torch.stack(parts), requires_grad=False)
    for leaf in origin._parameters:
        if leaf not in rows:
            origin._parameters[leaf] = experts._parameters[leaf]
    origin._buffers.update({name: experts._buffers[name] for name in origin._buffers})
    return origin


def quantized_experts(site: ExpertsSite, stored: dict[str, Tensor], experts: Sequence[int], which: int,
                      part: LinearSpec | None, device: torch.device,
                      found: Mapping[tuple[int, int], CanonicalWeight] = MappingProxyType({})
                      ) -> Iterator[Weight | Packed]:
    """One expert's first (0) or second (1) weight after the other, as `found`, or of those stored in the module's
    parameters; packed for the part's kernel already where its layout can."""
    for expert in experts:
        if part is not None and (which, expert) in found:
            yield CanonicalWeight({name: tensor.to(device) for name, tensor in found[which, expert].tensors.items()})
            continue
        if which == 0:
            weight = first_of(site, stored, expert)
        else:
            weight = stored[site.second][expert]
            weight = weight.t() if site.transposed[1] else weight
        weight = weight.to(device)
        yield weight.clone() if part is None else quantized(weight, part)
