"""Example inputs: a model, and what the user gave or nothing, in; the arguments of one forward out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# Odd and unequal, so that no two sizes of a graph agree by chance.
_BATCH, _LENGTH = 2, 3


@dataclass(frozen=True, kw_only=True)
class Example:
    """Arguments of a forward, and a sentence on where they come from."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any]
    origin: str


def example_of(model: nn.Module, given: Any = None) -> Example | None:
    """Arguments for `model`, on its device: `given` if not None (a tensor, a tuple or list of positional arguments,
    or a mapping of keywords), else the model's `dummy_inputs`, else deduced; None if nothing can be deduced."""
    if given is not None:
        example: Example | None = _given(given)
    else:
        example = _dummy(model) or _token_ids(model) or _pixels(model) or _floats(model)
    if example is None:
        return None
    device = device_of(model)
    args, kwargs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) and not v.is_meta else _on(v, device),
                            (example.args, example.kwargs))
    if "use_cache" not in kwargs and _takes(model, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}  # a smaller graph with the same products
    return Example(args=args, kwargs=kwargs, origin=example.origin)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lies that has numbers; meta if none has."""
    places = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    return next((place for place in places if place.type != "meta"), places[0] if places else torch.device("cpu"))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor) and value.device != device:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return value


def _given(given: Any) -> Example:
    origin = "the example inputs given"
    if isinstance(given, Mapping):
        return Example(kwargs=dict(given), origin=origin)
    if isinstance(given, (tuple, list)):
        return Example(args=tuple(given), kwargs={}, origin=origin)
    return Example(args=(given,), kwargs={}, origin=origin)


def _dummy(model: nn.Module) -> Example | None:
    try:
        inputs = getattr(model, "dummy_inputs", None)
    except Exception:  # a property of somebody's model class
        return None
    if not isinstance(inputs, Mapping):
        return None
    main = getattr(model, "main_input_name", None)
    if main is not None and main not in inputs and not any(_takes(model, name) for name in inputs):
        return None
    return Example(kwargs=dict(inputs), origin="the model's own dummy_inputs")


def _token_ids(model: nn.Module) -> Example | None:
    if not (_takes(model, "input_ids") or _first_leaf_is(model, nn.Embedding)):
        return None
    ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
    origin = f"token ids of shape [{_BATCH}, {_LENGTH}], deduced"
    if _takes(model, "input_ids"):
        names = [name for name in ("input_ids", "decoder_input_ids") if _takes(model, name)]
        return Example(kwargs=dict.fromkeys(names, ids), origin=origin)
    return Example(args=(ids,), kwargs={}, origin=origin)


def _pixels(model: nn.Module) -> Example | None:
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if not _takes(model, "pixel_values") or not isinstance(size, int):
        return None
    shape = (_BATCH, getattr(config, "num_channels", 3), size, size)
    return Example(kwargs={"pixel_values": torch.zeros(shape, dtype=_dtype_of(model))},
                   origin=f"pixels of shape {list(shape)}, deduced from the config's image_size")


def _floats(model: nn.Module) -> Example | None:
    first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if first is not None:
        features = first.in_features
    else:
        features = next((p.shape[-1] for p in model.parameters() if p.ndim == 2 and p.is_floating_point()), 0)
        norm = next((m for m in model.modules() if isinstance(m, nn.LayerNorm)), None)
        features = norm.normalized_shape[-1] if norm is not None else features
    needed = _needed_arguments(model)
    if not features or needed != 1:
        return None
    x = torch.zeros(_BATCH, features, dtype=_dtype_of(model))
    return Example(args=(x,), kwargs={}, origin=f"floats of shape [{_BATCH}, {features}], deduced from the weights")


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _first_leaf_is(model: nn.Module, kind: type[nn.Module]) -> bool:
    leaf = next((m for m in model.modules() if not list(m.children())), None)
    return isinstance(leaf, kind) and _needed_arguments(model) == 1


def _parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def _takes(model: nn.Module, name: str) -> bool:
    return name in _parameters_of(model)


def _needed_arguments(model: nn.Module) -> int:
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = _parameters_of(model).values()
    needed = sum(1 for p in parameters if p.kind in plain and p.default is p.empty)
    return needed or int(any(p.kind is p.VAR_POSITIONAL for p in parameters))
