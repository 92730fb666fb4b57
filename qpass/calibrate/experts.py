"""Experts: a block's modules of experts and what each expert was given in; integers of every expert by GPTQ out.

Each expert has Hessians of its own tokens alone. One that saw fewer tokens than its weight has columns is rounded on
searched scales without data, and named in a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qpass.calibrate.activation_store import ActivationStore
from qpass.calibrate.block_work import BlockWork
from qpass.calibrate.change_inputs import rounded
from qpass.calibrate.gptq_math import energy_order, gptq, inverse_factor, polish
from qpass.calibrate.hessian import Hessian
from qpass.calibrate.scale_search import canonical_of, find_grid, grid_ends, round_to_grid
from qpass.decide.decide_experts import blocks_of, spec_of_block
from qpass.decide.decision import Decision
from qpass.experts_site import ExpertsSite
from qpass.find.experts_rows import as_stored, first_of
from qpass.kernels.reference.experts import apply_gate
from qpass.recipes.algorithm import Gptq
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight

ExpertWeights = dict[tuple[int, int], CanonicalWeight]
"""(0 for the first or 1 for the second weight, expert) -> its integers."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertsWork:
    """One module of experts while its block is calibrated; `decisions` are those of all its weights."""

    site: ExpertsSite
    owner: nn.Module
    decisions: Sequence[Decision]
    found: ExpertWeights = field(default_factory=dict)

    def specs(self) -> dict[tuple[int, int], LinearSpec]:
        """What to round, and how; integers on scales of rows or groups alone."""
        found = {}
        for parts, experts in blocks_of(self.site, self.decisions):
            for which, spec in enumerate(spec_of_block(self.site, parts, len(experts)).parts):
                if spec is not None and spec.weight.type == "int" and spec.weight.granularity in (
                        "per_channel", "per_group"):
                    found.update({(which, expert): spec for expert in experts})
        return found

    def stored(self) -> dict[str, Tensor]:
        """The module's parameters by leaf, as they are now."""
        return {name: parameter.detach() for name, parameter in self.owner.named_parameters(recurse=False)}

    def own(self) -> None:
        """Make the parameters ones that can be written into."""
        for leaf in self.site.parameters:
            parameter = self.owner.get_parameter(leaf)
            parameter.data = parameter.data.clone()

    def settle(self, which: int, expert: int, weight: CanonicalWeight, spec: LinearSpec) -> None:
        """These integers are the result; from now on the module multiplies with what they stand for."""
        self.found[which, expert] = weight
        values = dequantize_weight(weight, spec)
        leaves = self.site.first if which == 0 else (self.site.second,)
        for leaf, rows in zip(leaves, as_stored(self.site, values) if which == 0 else [values], strict=True):
            parameter = self.owner.get_parameter(leaf)
            parameter.data[expert] = (rows.t() if self.site.transposed[which] else rows).to(parameter.dtype)


def calibrate_experts(settings: Gptq, work: ExpertsWork, inputs: ActivationStore, tell: Callable[[str], None]
                      ) -> list[str]:
    """Round every expert of the module; `inputs` are the arguments of its calls (rows x, index, weight). Notes."""
    specs = work.specs()
    work.own()
    few: list[int] = []
    for expert in range(work.site.experts):
        tell(f"{work.site.owner}: expert {expert + 1} of {work.site.experts}")
        for which in (0, 1):
            spec = specs.get((which, expert))
            if spec is None:
                continue
            hessian = Hessian(spec.in_features)
            for given in inputs:
                x = _rows_of(work.site, given, expert)
                x = x if which == 0 else _between(work.site, work.stored(), x, expert)
                args = spec.activation
                if args is not None and (args.type, args.bits, args.granularity, args.dynamic) == (
                        "int", 8, "per_token", True):
                    x = rounded(x, args)
                hessian.add(x)
            if hessian.rows < spec.in_features:
                few.append(expert)
            stored = work.stored()
            weight = first_of(work.site, stored, expert) if which == 0 else stored[work.site.second][expert]
            weight = weight.t() if which and work.site.transposed[1] else weight
            dtype = work.decisions[0].site.dtype
            work.settle(which, expert, _rounded(settings, weight.float(), spec, hessian,
                                                dtype if dtype.itemsize <= 4 else torch.float32), spec)
    names = ", ".join(str(expert) for expert in dict.fromkeys(few))
    return [f"gptq: experts {names} of {work.site.owner} saw fewer tokens than their weights have columns; rounded "
            "without data"] if few else []


def _rounded(settings: Gptq, weight: Tensor, spec: LinearSpec, seen: Hessian, dtype: torch.dtype) -> CanonicalWeight:
    if seen.rows < spec.in_features:
        return round_to_grid(weight, find_grid(weight, spec, "signed", dtype), spec, dtype)
    hessian = seen.value
    order = energy_order(hessian, settings.actorder)
    factor = inverse_factor(hessian, order, settings.dampening_frac)
    grid = find_grid(weight, spec, settings.scales, dtype, factor.importance(order), compensated=True)
    codes = gptq(weight, factor, order, grid, grid_ends(spec), settings.block_size)
    codes, grid = polish(codes, grid, weight, hessian, grid_ends(spec), dtype, sweeps=settings.sweeps,
                         refits=settings.refit and spec.weight.scales != "integer", dampening=factor.dampening)
    return canonical_of(codes, grid, dtype)


def tensors_of(works: Sequence[ExpertsWork]) -> dict[str, Tensor]:
    """The integers found, by names from which `take_back` finds them again."""
    return {f"experts|{work.site.owner}|{which}|{expert}|{key}": tensor for work in works
            for (which, expert), weight in work.found.items() for key, tensor in weight.tensors.items()}


def take_back(works: Sequence[ExpertsWork], kept: Mapping[str, Tensor]) -> None:
    """Settle what `tensors_of` kept."""
    for work in works:
        specs, device = work.specs(), work.stored()[work.site.second].device
        work.own()
        for (which, expert), spec in specs.items():
            prefix = f"experts|{work.site.owner}|{which}|{expert}|"
            tensors = {key.removeprefix(prefix): tensor.to(device) for key, tensor in kept.items()
                       if key.startswith(prefix)}
            if tensors:
                work.settle(which, expert, CanonicalWeight(tensors), spec)


def _rows_of(site: ExpertsSite, given: tuple[Tensor, Tensor | None, Tensor | None], expert: int) -> Tensor:
    """The rows [t, H] that one call gave to one expert."""
    x, index, weight = given
    rows = x.reshape(-1, site.hidden).float()
    if site.form == "sorted":
        share = len(rows) // site.experts
        return rows[expert * share:(expert + 1) * share]
    if site.form == "scored":
        assert weight is not None
        return rows[weight.reshape(-1, site.experts)[:, expert] != 0]
    assert index is not None
    return rows[(index.reshape(-1, index.shape[-1]) == expert).any(-1)]


def _between(site: ExpertsSite, stored: Mapping[str, Tensor], rows: Tensor, expert: int) -> Tensor:
    """What the second weight multiplies."""
    y = rows @ first_of(site, stored, expert).float().t()
    if site.first_bias is not None:
        y = y + first_of(site, stored, expert, bias=True).float()
    return apply_gate(y, site.gate)


def given_to(experts: ExpertsWork, work: BlockWork) -> ActivationStore:
    """The arguments x, index and weight of every call of the module while the block runs; masked tokens left out."""
    site, found = experts.site, ActivationStore(work.calls.budget)
    current: list[Tensor | None] = [None]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        parts = [None if one is None else kwargs[one.name] if one.name in kwargs else args[one.position]
                 for one in (site.x, site.index, site.weight)]
        mask = current[0]
        if site.form != "sorted":
            rows = [None if part is None else part.detach().reshape(-1, part.shape[-1]) for part in parts]
            kept = None if mask is None else mask.reshape(-1)
            parts = [row if row is None or kept is None or len(row) != len(kept) else row[kept.to(row.device)]
                     for row in rows]
        found.append(tuple(parts))

    handle = experts.owner.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        def masked() -> Iterator[Any]:
            for mask, call in zip(work.masks, work.calls, strict=True):
                current[0] = mask
                yield call

        for _ in work.outputs(masked()):
            pass
    finally:
        handle.remove()
    return found
