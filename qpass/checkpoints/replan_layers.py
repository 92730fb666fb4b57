"""Replan layers: a checkpoint's layers and a recipe in; the same integers with the recipe's activations out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from qpass.checkpoints.checkpoint_experts import ExpertsLayer
from qpass.checkpoints.checkpoint_layers import Layer
from qpass.decide.decide_experts import ROUNDED
from qpass.errors import CheckpointError
from qpass.recipes.recipe_files import as_recipe
from qpass.scheme import ActivationArgs, Scheme, family_of
from qpass.spec import LinearSpec


def replan(model: nn.Module, layers: Sequence[Layer], experts: Sequence[ExpertsLayer], recipe: Any, where: str
           ) -> tuple[list[Layer], list[ExpertsLayer], list[str]]:
    """The layers and experts as `recipe` wants them, and lines for the report; `model` may still be empty.

    A W4A16 checkpoint runs as W4A8: codes, scales, zero points and groups stay the checkpoint's, only what an
    activation is rounded to changes. Layers that the recipe leaves in float stay as they are, for nothing can undo
    their rounding, and layers that the checkpoint has in float stay float. Raises CheckpointError if the recipe wants
    weights of another type or width, naming both.
    """
    from qpass.plan_model import make_plan

    plan = make_plan(model, as_recipe(recipe))
    wanted: dict[str, Scheme | None] = {}
    for decision in plan.decisions:
        scheme = decision.scheme if decision.status == "quantize" else None
        for name in (decision.site.name, *decision.site.aliases):
            wanted[name] = scheme
    wrong: list[str] = []
    kept: list[str] = []

    def as_wanted(spec: LinearSpec, path: str, names: Sequence[str]) -> LinearSpec:
        scheme = next((wanted[name] for name in names if wanted.get(name) is not None), None)
        if scheme is None:
            kept.append(path)
        elif (scheme.weight.type, scheme.weight.bits) != (spec.weight.type, spec.weight.bits):
            wrong.append(f"{path}: {scheme.name} wants {scheme.weight.number} weights, the "
                         f"checkpoint has {spec.weight.number}")
        else:
            return with_activation(spec, scheme.activation)
        return spec

    done = [replace(layer, read=replace(layer.read, spec=as_wanted(
        layer.read.spec, layer.paths[0], _names(layer))))
            for layer in layers]
    stacks = [_experts_as(layer, as_wanted) for layer in experts]
    count = len(layers) + sum(part is not None for layer in experts for parts, _ in layer.blocks for part in parts)
    if wrong or len(kept) == count:
        what = "\n  ".join(wrong[:10]) or "the recipe leaves every layer of the checkpoint in float"
        raise CheckpointError(f"{where} is quantized already, and a recipe can only change what its activations are "
                              f"rounded to:\n  {what}\ngive a recipe of the checkpoint's own weights, or quantize the "
                              "float model")
    notes = ["re-planned: codes, scales and groups are the checkpoint's, activations the recipe's"]
    if kept:
        notes.append(f"the recipe keeps {kept[0]}" + (f" and {len(kept) - 1} more" if len(kept) > 1 else "")
                     + " in float; the checkpoint has it quantized, and so it stays")
    read = {name for layer in layers for name in _names(layer)} | {n for layer in experts for n in layer.parameters}
    left = [name for name, scheme in wanted.items() if scheme is not None and name not in read]
    if left:
        notes.append(f"the recipe quantizes {left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
                     + "; the checkpoint has it in float, and so it stays")
    return done, stacks, notes


def with_activation(spec: LinearSpec, activation: ActivationArgs | None) -> LinearSpec:
    """The same weight, with what its input is rounded to."""
    return replace(spec, activation=activation, family=family_of(spec.weight, activation))


def _experts_as(layer: ExpertsLayer, as_wanted: Callable[[LinearSpec, str, Sequence[str]], LinearSpec]) -> ExpertsLayer:
    site = layer.site
    names = [[f"{site.owner}.{leaf}" for leaf in leaves] for leaves in (site.first, (site.second,))]

    def one(part: LinearSpec | None, which: int) -> LinearSpec | None:
        spec = None if part is None else as_wanted(part, names[which][0], names[which])
        return spec if spec is None or spec.activation in (None, *ROUNDED) else spec.weight_only()

    return replace(layer, blocks=tuple(((one(parts[0], 0), one(parts[1], 1)), experts)
                                       for parts, experts in layer.blocks))


def _names(layer: Layer) -> list[str]:
    return [f"{path}.{layer.leaf}" if layer.module else path for path in layer.paths]
