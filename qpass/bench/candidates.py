"""Bench candidates: a model folder in, the recipes worth trying on this machine out, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qpass.capture.capture_model import capture
from qpass.checkpoints.model_folder import load_meta
from qpass.decide.decide_sites import decide
from qpass.errors import QPassError
from qpass.find.find_sites import find
from qpass.recipes.recipe_files import as_recipe
from qpass.scheme import PRESETS, Scheme
from qpass.site import Site

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
    sites = find(model, capture(model))
    chosen: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    same: dict[tuple[Any, Any], str] = {}
    for name, scheme in PRESETS.items():
        numbers = scheme.weight, scheme.activation
        why = f"the same numbers as {same[numbers]}" if numbers in same else _why_not(sites, scheme)
        same.setdefault(numbers, name)
        if why is None:
            chosen[name] = as_recipe(name)
        else:
            skipped[name] = why
    return Candidates(chosen=chosen, skipped=skipped)


def _why_not(sites: Sequence[Site], scheme: Scheme) -> str | None:
    if scheme.activation is not None and scheme.activation.static:
        return "its activation scales need calibration"
    try:
        decisions = decide(sites, as_recipe(scheme.name), device=torch.device("cpu"))
    except QPassError as error:
        return str(error).splitlines()[0]
    quantized = [d for d in decisions if d.status == "quantize" and d.spec is not None]
    refused = [d for d in decisions if d.status == "refuse"]
    if not quantized:
        return "it would quantize no layer here"
    if refused:
        return f"it does not fit {len(refused)} layers, such as {refused[0].site.name}: {refused[0].reason}"
    other = [d for d in quantized if d.spec is not None and d.spec.family != scheme.family]
    if other and other[0].spec is not None:
        return f"it would run as {other[0].spec.family} here"
    slow = sum(d.spec is not None and d.spec.kernel == FALLBACK for d in quantized)
    return f"no fast kernel here for {slow} of {len(quantized)} layers" if slow else None


def _label(recipe: Any) -> str:
    if isinstance(recipe, str):
        return Path(recipe).stem
    return getattr(getattr(recipe, "scheme", None), "name", None) or "recipe"
