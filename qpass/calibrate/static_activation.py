"""Static activation: a float model and inputs for it in, one scale out for each layer whose activation is static.

This is calibration without algorithms: the float model is run as a whole. With them each block is measured when its
algorithms are done (activation_range.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from qpass.activation_scale import ActivationScale
from qpass.calibrate.input_range import InputRanges
from qpass.calibrate.watch_inputs import watch_inputs
from qpass.capture.as_found import in_eval_mode
from qpass.capture.example_inputs import example_of
from qpass.decide.decision import Decision
from qpass.errors import RecipeError


def static_scales(model: Any, targets: Sequence[Decision], data: Iterable[Any] | None) -> dict[str, ActivationScale]:
    """Site name -> scale, for the targets with a static activation; {} if there are none and no data is given.

    Raises RecipeError if data is missing, is empty, is given for nothing, or never reaches one of the layers, and
    CalibrationError if a layer's input was NaN or Inf.
    """
    static = [d for d in targets if d.spec is not None and d.spec.activation is not None and d.spec.activation.static]
    if data is None:
        if static:
            raise RecipeError(
                f"{len(static)} layers have static activation scales, the first is {static[0].site.name}, and nothing "
                "says what they are: pass calibration=[inputs of the model, ...], load a checkpoint that holds them, "
                "or choose a scheme that rounds each token by itself, such as w8a8 or w4a8")
        return {}
    if not static:
        raise RecipeError("calibration data was given, and nothing in the recipe is calibrated: static activation "
                          "scales are (w8a8_static, w4a8_static); leave calibration out")
    ranges = _ranges(model, static, data)
    found = {}
    for decision in static:
        if decision.site.name not in ranges:
            raise RecipeError(f"the calibration data never reached {decision.site.name}, so its static scale is not "
                              "known; add inputs that do, add the layer to ignore, or give it a dynamic scheme")
        assert decision.spec is not None and decision.spec.activation is not None
        dtype = decision.site.dtype if decision.site.dtype.itemsize <= 4 else torch.float32
        found[decision.site.name] = ranges.scale(decision.site.name, decision.spec.activation, dtype)
    return found


def _ranges(model: nn.Module, static: Sequence[Decision], data: Iterable[Any]) -> InputRanges:
    """Run the model on every item and note each site's smallest and largest input."""
    ranges = InputRanges()
    sites = [decision.site for decision in static]
    modules = {site.name: model.get_submodule(site.owner) for site in sites if site.swap == "module"}
    parameters = {site.name: model.get_parameter(site.name) for site in sites if site.swap != "module"}
    seen = 0
    with torch.no_grad(), in_eval_mode(model), watch_inputs(modules, parameters, ranges.add):
        for item in data:
            example = example_of(model, item)
            assert example is not None
            model(*example.args, **example.kwargs)
            seen += 1
    if seen == 0:
        raise RecipeError("calibration holds no inputs; give some, each as one call of the model takes it (an iterator "
                          "that was used up before gives none)")
    return ranges
