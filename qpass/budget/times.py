"""Search times: decisions in, seconds that one token takes in each layer, packed and in float, measured here, out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from qpass.calibrate.samples import Sample
from qpass.decide.decision import Decision
from qpass.errors import RecipeError
from qpass.quantize_model import quantize
from qpass.recipes.recipe import Recipe

_CALLS = 15


def layer_times(by_scheme: Mapping[str, Mapping[str, Decision]]) -> dict[tuple[str, str | None], float]:
    """(site name, scheme name or None for float) -> seconds of its product with one token, as a layer of that shape.

    Raises RecipeError for experts, whose time depends on which of them a token reaches.
    """
    known: dict[tuple[Any, ...], float] = {}
    found: dict[tuple[str, str | None], float] = {}
    for scheme, decisions in by_scheme.items():
        for name, decision in decisions.items():
            site = decision.site
            if len(site.shape) != 2:
                raise RecipeError(f"{name} holds experts, whose time a token is not known before it is routed; give a "
                                  "budget in bits or bytes")
            shape = (site.out_features, site.in_features, site.dtype)
            for key in (None, scheme):
                if (*shape, key) not in known:
                    known[*shape, key] = _seconds(decision, packed=key is not None)
                found[name, key] = known[*shape, key]
    return found


def step_time(model: nn.Module, sample: Sample, products: float) -> float:
    """Seconds of one token through the float model without its products."""
    first = {name: value[:1, :1] for name, value in sample.kwargs.items() if isinstance(value, torch.Tensor)}
    args = tuple(value[:1, :1] for value in sample.args if isinstance(value, torch.Tensor))
    return max(0.0, _median(lambda: model(*args, **first)) - products)


def _seconds(decision: Decision, *, packed: bool) -> float:
    site = decision.site
    layer = nn.Sequential(nn.Linear(site.in_features, site.out_features, bias=False, dtype=site.dtype))
    x = torch.randn(1, site.in_features, dtype=site.dtype)
    if packed:
        assert decision.scheme is not None
        quantize(layer, Recipe(decision.scheme), example_inputs=x, progress=False)
    return _median(lambda: layer(x))


def _median(call: Callable[[], object]) -> float:
    taken = []
    with torch.no_grad():
        for number in range(_CALLS + 3):
            start = time.perf_counter()
            call()
            if number >= 3:
                taken.append(time.perf_counter() - start)
    return median(taken)
