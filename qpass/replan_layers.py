"""Replan layers: a checkpoint's layers and a recipe in; the same integers with the recipe's activations out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from qpass.checkpoint_layers import Layer
from qpass.errors import CheckpointError
from qpass.recipe_files import as_recipe
from qpass.scheme import Scheme, scheme_for


def replan(model: nn.Module, layers: Sequence[Layer], recipe: Any, where: str) -> tuple[list[Layer], list[str]]:
    """The layers as `recipe` wants them, and lines for the report; `model` may still be empty.

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
    done: list[Layer] = []
    wrong: list[str] = []
    kept: list[str] = []
    for layer in layers:
        scheme = next((wanted[name] for name in _names(layer) if wanted.get(name) is not None), None)
        spec = layer.read.spec
        if scheme is None:
            kept.append(layer.paths[0])
            done.append(layer)
        elif (scheme.weight.type, scheme.weight.bits) != (spec.weight.type, spec.weight.bits):
            wrong.append(f"{layer.paths[0]}: {scheme.name} wants {scheme.weight.type}{scheme.weight.bits} weights, the "
                         f"checkpoint has {spec.weight.type}{spec.weight.bits}")
        else:
            family = scheme_for(spec.weight, scheme.activation).family
            done.append(replace(layer, read=replace(layer.read, spec=replace(
                spec, family=family, activation=scheme.activation))))
    if wrong or len(kept) == len(layers):
        what = "\n  ".join(wrong[:10]) or "the recipe leaves every layer of the checkpoint in float"
        raise CheckpointError(f"{where} is quantized already, and a recipe can only change what its activations are "
                              f"rounded to:\n  {what}\ngive a recipe of the checkpoint's own weights, or quantize the "
                              "float model")
    notes = ["re-planned: codes, scales and groups are the checkpoint's, activations the recipe's"]
    if kept:
        notes.append(f"the recipe keeps {kept[0]}" + (f" and {len(kept) - 1} more" if len(kept) > 1 else "")
                     + " in float; the checkpoint has it quantized, and so it stays")
    read = {name for layer in layers for name in _names(layer)}
    left = [name for name, scheme in wanted.items() if scheme is not None and name not in read]
    if left:
        notes.append(f"the recipe quantizes {left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
                     + "; the checkpoint has it in float, and so it stays")
    return done, notes


def _names(layer: Layer) -> list[str]:
    return [f"{path}.{layer.leaf}" if layer.module else path for path in layer.paths]
