"""Bench candidates: a model folder in, the recipes worth trying on this machine out, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpass.errors import QPassError
from qpass.model_folder import load_meta
from qpass.plan_model import make_plan
from qpass.recipe_files import as_recipe
from qpass.scheme import PRESETS

FALLBACK = "linear_reference"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """`chosen` maps a label to a recipe; `skipped` maps a label to the sentence that says why it is not tried."""

    chosen: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)


def candidates(folder: Path, recipes: Sequence[Any] | None) -> Candidates:
    """The given recipes as they are; without any, each preset that has a kernel here for every layer it quantizes.

    Plans are made on the meta device: no weight is read. Raises what reading a given recipe raises.
    """
    if recipes:
        return Candidates(chosen={_label(recipe): as_recipe(recipe) for recipe in recipes})
    model = load_meta(folder)
    chosen: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    same: dict[tuple[Any, Any], str] = {}
    for name, scheme in PRESETS.items():
        numbers = scheme.weight, scheme.activation
        if numbers in same:
            skipped[name] = f"the same numbers as {same[numbers]}"
            continue
        same[numbers] = name
        why = _why_not(model, name)
        if why is None:
            chosen[name] = as_recipe(name)
        else:
            skipped[name] = why
    return Candidates(chosen=chosen, skipped=skipped)


def _why_not(model: Any, name: str) -> str | None:
    try:
        plan = make_plan(model, name)
    except QPassError as error:
        return str(error).splitlines()[0]
    quantized = [row for row in plan.rows if row.status == "quantize"]
    refused = [row for row in plan.rows if row.status == "refuse"]
    if not quantized:
        return "it would quantize no layer"
    if refused:
        return f"it does not fit {len(refused)} layers, such as {refused[0].name}: {refused[0].reason}"
    slow = [row for row in quantized if row.kernel == FALLBACK]
    return f"no fast kernel for {len(slow)} of {len(quantized)} layers, such as {slow[0].name}" if slow else None


def _label(recipe: Any) -> str:
    if isinstance(recipe, str):
        return Path(recipe).stem
    return getattr(getattr(recipe, "scheme", None), "name", None) or "recipe"
