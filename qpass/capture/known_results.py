"""Known results: an ATen call on fake tensors in, its result out; calls of one kind are worked out once.

A model's layers make the same calls on the same shapes, and to work out what one gives costs a third of a millisecond.
Two calls are of one kind if nothing differs that the shape, strides, dtype or device of a result could depend on: op,
every number and setting among the arguments, all that a fake tensor is, gradient mode and default dtype. Calls whose
results may depend on more (numbers that a fake tensor knows, tensor types of others, ops that write into an argument
or give one back) are worked out each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

_PLAIN = (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
_Part = tuple[Tensor, torch.device, dict[str, Any]]  # a tensor on the meta device, that of its fake, its attributes
_UNSURE = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)


class KnownResults:
    """Remembers for one run, all of whose fake tensors are of one mode."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[type, list[_Part]]] = {}
        self._ops: dict[Any, bool] = {}
        self._decomposes: dict[Any, bool] = {}

    def decomposes(self, func: Any) -> bool:
        """Whether `func` can be written in other calls, asked once for each."""
        if func not in self._decomposes:
            self._decomposes[func] = func._can_decompose()
        return self._decomposes[func]

    def call(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What `func(*args, **kwargs)` gives."""
        if func not in self._ops:
            self._ops[func] = not func._schema.is_mutable and not any(tag in func.tags for tag in _UNSURE)
        try:
            key = (func, _kind(args), _kind(kwargs), *_mode()) if self._ops[func] else None
        except _Other:
            key = None
        if key is None:
            return func(*args, **kwargs)
        if (known := self._known.get(key)) is not None:
            kind, parts = known
            made = [_another(like) for like in parts]
            return made[0] if kind is Tensor else kind(made)
        result = func(*args, **kwargs)
        if (found := _parts(result, (args, kwargs))) is not None:
            self._known[key] = (Tensor if isinstance(result, Tensor) else type(result), found)
        return result


class _Other(Exception):
    """Something among the arguments of which not all is known."""


def _kind(value: Any) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.real_tensor is not None:
            raise _Other
        return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device,
                value.requires_grad, id(value.fake_mode), torch._C._dispatch_keys(value).raw_repr())
    if value is None:
        return None
    if kind in _PLAIN:
        return kind, value  # the type too: 1 == 1.0 == True
    if kind is tuple or kind is list:
        return kind, tuple([_kind(item) for item in value])
    if kind is dict:
        return tuple([(key, _kind(item)) for key, item in value.items()])
    raise _Other


def _mode() -> tuple[Any, ...]:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled())


def _parts(result: Any, given: Any) -> list[_Part] | None:
    """What makes another of each tensor that came out; None for what is better not kept."""
    tensors = [result] if isinstance(result, Tensor) else result
    if type(tensors) not in (list, tuple) or not tensors:
        return None
    parts = []
    for tensor in tensors:
        if type(tensor) is not FakeTensor or tensor.constant is not None or _holds(given, tensor):
            return None
        with _disable_current_modes():
            size = 1 + tensor.storage_offset() + sum(
                (count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True) if count)
            meta = torch.empty(size, dtype=tensor.dtype, device="meta").as_strided(
                tensor.shape, tensor.stride(), tensor.storage_offset())
            fake = FakeTensor(tensor.fake_mode, meta, tensor.fake_device)
            part = meta, tensor.fake_device, dict(vars(fake))
            if _kind(_another(part)) != _kind(tensor):
                return None
        parts.append(part)
    return parts


def _another(part: _Part) -> FakeTensor:
    """A fake tensor as new: what its constructor makes, without asking again what it asks."""
    meta, device, attributes = part
    made: FakeTensor = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True,
                                             device_for_backend_keys=device)
    vars(made).update(attributes)
    return made


def _holds(given: Any, tensor: Tensor) -> bool:
    if isinstance(given, (tuple, list)):
        return any(_holds(item, tensor) for item in given)
    if isinstance(given, dict):
        return any(_holds(item, tensor) for item in given.values())
    return given is tensor
