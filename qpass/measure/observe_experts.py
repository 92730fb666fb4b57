"""Observe experts: a reference and its quantized twin in; what each projection of their experts gives in both out.

A projection is multiplied in float32 with weights and activations as rounded, so that its own error is seen apart; the
layer as a whole by its kernel. Accumulated errors are those of the reference's input under the quantized model's
routing, because another choice of experts would compare different products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import EvaluationError
from qpass.find.experts_rows import first_of
from qpass.kernels.reference.experts import apply_gate, rounded
from qpass.layers.experts_layer import QuantExperts
from qpass.measure.observe import Meter


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertsPair:
    """Packed experts and the module that they stand for."""

    packed: QuantExperts
    reference: nn.Module

    def weight(self, which: int, expert: int) -> Tensor:
        """One expert's first (0) or second (1) weight [N, K] in the reference, float32."""
        if isinstance(self.reference, QuantExperts):
            return self.reference.dequantize(which, expert, torch.float32)
        site, stored = self.packed.site, dict(self.reference.named_parameters(recurse=False))
        if which == 0:
            return first_of(site, {leaf: stored[leaf].detach() for leaf in site.first}, expert).float()
        down = stored[site.second].detach()[expert].float()
        return down.t() if site.transposed[1] else down


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of the reference's experts: their input as rows, and their result."""

    x: Tensor
    output: Tensor


def pair_experts(reference: nn.Module, model: nn.Module) -> dict[str, ExpertsPair]:
    """Each module of packed experts of `model`, by name; EvaluationError if `reference` has nothing there."""
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            try:
                pairs[name] = ExpertsPair(packed=module, reference=reference.get_submodule(name))
            except AttributeError as error:
                raise EvaluationError(f"the reference has nothing at {name!r}, where the model has experts; compare "
                                      "needs the float model that was quantized") from error
    return pairs


def row_specs(name: str, experts: QuantExperts) -> dict[str, str]:
    """The rows that a layer of experts gets in a comparison: its projections, then the layer; with their specs."""
    parts = {leaf: experts.blocks[0].spec.parts[0 if experts.site.is_first(leaf) else 1]
             for leaf in experts.site.parameters}
    return {**{f"{name}.{leaf}": "float" if part is None else str(part) for leaf, part in parts.items()},
            name: experts.blocks[0].text}


def keep_experts(pairs: Mapping[str, ExpertsPair], hooks: ExitStack) -> dict[str, list[Call]]:
    """Keep every call of the reference's experts while `hooks` is open."""
    kept: dict[str, list[Call]] = {name: [] for name in pairs}
    for name, pair in pairs.items():
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name,
                 pair: ExpertsPair = pair) -> None:
            x = pair.packed.routing(*args, **kwargs)[0]
            kept[name].append(Call(x=x.detach().clone(), output=output.detach().clone()))

        hooks.callback(pair.reference.register_forward_hook(keep, with_kwargs=True).remove)
    return kept


def observe_experts(pairs: Mapping[str, ExpertsPair], meters: Mapping[str, Meter], kept: Mapping[str, list[Call]],
                    order: list[str], hooks: ExitStack) -> None:
    """Hand each call of packed experts to the meters of its rows while `hooks` is open; adds names to `order`."""
    for name, pair in pairs.items():
        queue = iter(kept[name])

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name,
                  pair: ExpertsPair = pair, queue: Iterator[Call] = queue) -> None:
            want = next(queue, None)
            if want is None:
                raise EvaluationError(f"{name} is called more often in the model than in the reference; are these two "
                                      "the same model?")
            if name not in order:
                order.extend(row_specs(name, pair.packed))
            x, index, _ = pair.packed.routing(*args, **kwargs)
            site = pair.packed.site
            for which, three in enumerate(_products(pair, x, want.x, index)):
                leaves = (site.second,) if which else site.first
                for leaf, got, local, accumulated in zip(leaves, *(t.chunk(len(leaves), -1) for t in three),
                                                         strict=True):
                    meters[f"{name}.{leaf}"].add(got, local, accumulated)
            meters[name].add(output, _as_reference(pair, args, kwargs), want.output)

        hooks.callback(pair.packed.register_forward_hook(watch, with_kwargs=True).remove)


def _as_reference(pair: ExpertsPair, args: Any, kwargs: Any) -> Tensor:
    """What the reference's experts make of the same input and routing."""
    held = next((p for p in pair.reference.parameters()), None)

    def placed(value: Any) -> Any:
        if held is None or not isinstance(value, Tensor):
            return value
        return value.to(held.device, held.dtype if value.is_floating_point() else None)

    result: Tensor = pair.reference.forward(*map(placed, args), **{key: placed(v) for key, v in kwargs.items()})
    return result


def _products(pair: ExpertsPair, x: Tensor, x_reference: Tensor, index: Tensor) -> list[tuple[Tensor, ...]]:
    """Of the first and the second product of every chosen expert: as rounded, in float of the same input, and in float
    of the reference's; rows [pairs, N] in the order of experts."""
    packed = pair.packed
    found: tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]] = ([], [])
    first_bias, second_bias = packed.first_bias_rows, packed.second_bias_rows
    for expert in index[(index >= 0) & (index < packed.site.experts)].unique().tolist():
        token = (index == expert).nonzero(as_tuple=True)[0]
        spec = next(block.spec for block in packed.blocks if expert in block.experts)
        inputs = x[token].float(), x_reference.to(x.device)[token].float()
        for which, bias in enumerate((first_bias, second_bias)):
            coarse, fine = packed.dequantize(which, expert, torch.float32), pair.weight(which, expert).to(x.device)
            add = 0.0 if bias is None else bias[expert].float()
            three = (rounded(inputs[0], spec.parts[which]) @ coarse.t() + add, inputs[0] @ fine.t() + add,
                     inputs[1] @ fine.t() + add)
            found[which].append(three)
            if which == 0:
                inputs = apply_gate(three[0], spec.gate), apply_gate(three[2], spec.gate)
    return [tuple(torch.cat(list(part)) for part in zip(*rows, strict=True)) for rows in found if rows]
