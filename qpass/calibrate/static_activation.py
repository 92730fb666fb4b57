"""Static activation: a float model and inputs for it in, one scale out for each layer whose activation is static.

The smallest and the largest value of a layer's input over all calibration inputs are its range (minmax, as LLM
Compressor's observer of that name); `activation_scale` makes the scale of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qpass.activation_scale import ActivationScale, scale_of_range
from qpass.decide import Decision
from qpass.errors import RecipeError
from qpass.example_inputs import example_of

_aten = torch.ops.aten
_OPERANDS = {_aten.mm.default: (0, 1), _aten.addmm.default: (1, 2), _aten.bmm.default: (0, 1),
             _aten.linear.default: (0, 1), _aten.matmul.default: (0, 1)}


def static_scales(model: Any, targets: Sequence[Decision], data: Iterable[Any] | None) -> dict[str, ActivationScale]:
    """Site name -> scale, for the targets with a static activation; {} if there are none and no data is given.

    Raises RecipeError if data is missing, is empty, is given for nothing, or never reaches one of the layers.
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
        low, high = ranges.get(decision.site.name, (None, None))
        if low is None or high is None:
            raise RecipeError(f"the calibration data never reached {decision.site.name}, so its static scale is not "
                              "known; add inputs that do, add the layer to ignore, or give it a dynamic scheme")
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise RecipeError(f"the input of {decision.site.name} was NaN or Inf during calibration; look for the "
                              "input that causes it, or give the layer a dynamic scheme")
        assert decision.spec is not None and decision.spec.activation is not None
        dtype = decision.site.dtype if decision.site.dtype.itemsize <= 4 else torch.float32
        found[decision.site.name] = scale_of_range(low, high, decision.spec.activation, dtype)
    return found


def _ranges(model: nn.Module, static: Sequence[Decision], data: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """Run the model on every item and note each site's smallest and largest input."""
    ranges: dict[str, tuple[float, float]] = {}
    seen, training = 0, model.training
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as watching:
            pointers: dict[int, str] = {}
            for decision in static:
                if decision.site.swap == "module":
                    owner = model.get_submodule(decision.site.owner)
                    watching.callback(owner.register_forward_pre_hook(_hook(decision.site.name, ranges)).remove)
                else:
                    weight = model.get_parameter(decision.site.name)
                    pointers[weight.untyped_storage().data_ptr()] = decision.site.name
            if pointers:
                watching.enter_context(_Products(pointers, ranges))
            for item in data:
                example = example_of(model, item)
                assert example is not None
                model(*example.args, **example.kwargs)
                seen += 1
    finally:
        model.train(training)
    if seen == 0:
        raise RecipeError("calibration holds no inputs; give some, each as one call of the model takes it (an iterator "
                          "that was used up before gives none)")
    return ranges


def _hook(name: str, ranges: dict[str, tuple[float, float]]) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: _note(name, args[0], ranges)


def _note(name: str, x: Tensor, ranges: dict[str, tuple[float, float]]) -> None:
    if x.numel() == 0:
        return
    low, high = (float(value) for value in x.aminmax())
    before = ranges.get(name, (low, high))
    ranges[name] = (low, high) if low != low else (min(before[0], low), max(before[1], high))


class _Products(TorchDispatchMode):
    """Sees every matrix product, and notes the other operand of those that read one of the watched weights."""

    def __init__(self, pointers: dict[int, str], ranges: dict[str, tuple[float, float]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pointers, self.ranges = pointers, ranges

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first = _OPERANDS.get(func)
        for mine, other in () if first is None else (first, first[::-1]):
            name = self.pointers.get(args[mine].untyped_storage().data_ptr())
            if name is not None:
                _note(name, args[other], self.ranges)
        return func(*args, **(kwargs or {}))
