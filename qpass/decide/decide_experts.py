"""Decide experts: drafted decisions of experts' weights in, the same with the kernel of each module of experts out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from qpass.activation_args import ActivationArgs
from qpass.decide.decision import Decision
from qpass.experts_site import ExpertsSite
from qpass.experts_spec import ExpertsSpec
from qpass.kernels.experts_choice import choose_experts
from qpass.kernels.registry import ExpertsCall
from qpass.spec import LinearSpec

ROUNDED = (ActivationArgs(), ActivationArgs(symmetric=False))
Parts = tuple[LinearSpec | None, LinearSpec | None]


def keep_activations(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Leave the activations of experts in float where no kernel of experts rounds them as asked, and say so."""
    return tuple(_keep_activation(d) if d.site.kind == "experts" and d.spec is not None else d for d in decisions)


def _keep_activation(decision: Decision) -> Decision:
    specs = (decision.spec, *decision.experts)
    asked = next((s.activation for s in specs if s is not None and s.activation is not None
                  and s.activation not in ROUNDED), None)
    if asked is None:
        return decision
    spec, *experts = (s if s is None or s.activation is None or s.activation in ROUNDED else s.weight_only()
                      for s in specs)
    told = f"activation kept in float, not {asked.number}: experts round theirs to int8, dynamic, per token"
    return replace(decision, spec=spec, experts=tuple(experts), reason="; ".join(filter(None, (decision.reason, told))))


def equal_halves(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Refuse gate and up, stored apart, that are to be quantized differently: they are one product."""
    changed: dict[str, Decision] = {}
    for site, group in experts_modules(decisions):
        first = [d for d in group if site.is_first(_leaf(d))]
        if len({(d.spec, d.experts, d.status == "quantize") for d in first}) > 1:
            names = " and ".join(_leaf(d) for d in first)
            for d in first:
                changed[d.site.name] = replace(
                    d, status="refuse", spec=None, experts=(), bytes_after=d.bytes_before,
                    reason=f"{names} are one product of the experts, and rules want different things for them; give "
                           "both one scheme, or add both to ignore")
    return tuple(changed.get(d.site.name, d) for d in decisions)


def with_experts_kernels(decisions: Sequence[Decision], device: torch.device) -> dict[str, Decision]:
    """Site name -> its decision with kernels chosen, for every weight of experts that is to be quantized."""
    chosen: dict[str, Decision] = {}
    for site, group in experts_modules(decisions):
        if not any(d.status == "quantize" for d in group):
            continue
        kernels: list[str] = []
        refusals: dict[str, str] = {}
        on: dict[Parts, ExpertsSpec] = {}
        for parts, experts in blocks_of(site, group):
            call = ExpertsCall(spec=spec_of_block(site, parts, len(experts)), device=device, dtype=group[0].site.dtype,
                               bias=site.first_bias is not None)
            on[parts], why = choose_experts(call, where=site.owner)
            kernels.append(on[parts].kernel)
            refusals |= why
        for d in group:
            if d.status != "quantize":
                continue
            which = 0 if site.is_first(_leaf(d)) else 1
            specs = [on[_parts(site, group, e)].parts[which] for e in range(site.experts)]
            known = next(spec for spec in specs if spec is not None)
            chosen[d.site.name] = replace(
                d, spec=known if not d.experts else next(s for s in specs if s is not None and d.spec is not None
                                                         and s.on(d.spec.kernel) == d.spec),
                experts=tuple(specs) if d.experts else (), kernel=", ".join(dict.fromkeys(kernels)),
                refusals=refusals)
    return chosen


def experts_modules(decisions: Sequence[Decision]) -> Iterator[tuple[ExpertsSite, list[Decision]]]:
    """Each understood module of experts with the decisions of its weights."""
    groups: dict[str, list[Decision]] = {}
    for d in decisions:
        if d.site.experts is not None:
            groups.setdefault(d.site.experts.owner, []).append(d)
    for group in groups.values():
        assert group[0].site.experts is not None
        yield group[0].site.experts, group


def blocks_of(site: ExpertsSite, group: Sequence[Decision]) -> list[tuple[Parts, tuple[int, ...]]]:
    """The experts that share one pair of specs, for each pair, in order of first appearance."""
    found: dict[Parts, list[int]] = {}
    for expert in range(site.experts):
        found.setdefault(_parts(site, group, expert), []).append(expert)
    return [(parts, tuple(experts)) for parts, experts in found.items()]


def spec_of_block(site: ExpertsSite, parts: Parts, experts: int) -> ExpertsSpec:
    """The spec of some of the experts, before a kernel is chosen. Gate and up stored apart become one weight."""
    up, down = parts
    if up is not None:
        up = replace(up, out_features=site.intermediate * (2 if site.gate.gated else 1))
    return ExpertsSpec(experts=experts, hidden=site.hidden, intermediate=site.intermediate, gate=site.gate, up=up,
                       down=down)


def _parts(site: ExpertsSite, group: Sequence[Decision], expert: int) -> Parts:
    found: list[LinearSpec | None] = [None, None]
    for d in group:
        if d.status == "quantize":
            spec = d.spec_of(expert)
            found[0 if site.is_first(_leaf(d)) else 1] = None if spec is None else spec.on("linear_reference")
    return found[0], found[1]


def _leaf(decision: Decision) -> str:
    return decision.site.name.rpartition(".")[2]
