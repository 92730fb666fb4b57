"""As found: a model in, the same model out of the block with its flags, attributes and settings as they were before."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as _every_module

_EXPERTS_SETTING = "_experts_implementation"  # a config that has it lets one choose how experts are computed
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch.export")
_MUTABLE = (dict, list, set, deque)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Undo, also after an exception, whatever the block did to attributes of `model`'s modules.

    Attributes are put back by identity; dicts, lists and sets among them (parameters, buffers and hooks are such)
    are put back item by item. Tensors are not copied: the block must not write into them.
    """
    saved = [(module, dict(vars(module)), _contents_of(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for holder, content in contents:
                _put_back(holder, content)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module's `training` is False within; set directly, for a model may override train()."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within, hooks around a forward do not run: they are a user's own, and would see tensors that hold no numbers.

    PyTorch's own stay (`weight_norm` computes the weight in one). The order of hooks is kept.
    """
    holders: list[dict[Any, Any]] = [vars(module)[name] for module in model.modules() for name in _HOOKS]
    holders += [_every_module._global_forward_hooks, _every_module._global_forward_pre_hooks]
    saved = [(holder, holder.copy()) for holder in holders]
    try:
        for holder, content in saved:
            for key, hook in content.items():
                if not _is_of_torch(hook):
                    del holder[key]
        yield
    finally:
        for holder, content in saved:
            _put_back(holder, content)


def _is_of_torch(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(function, "__module__", "")).startswith("torch.")


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Within, PyTorch's loggers are silent: what fails is told by whoever tries it, in a sentence."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextmanager
def experts_as(model: nn.Module, implementation: str) -> Iterator[bool]:
    """Choose how experts are computed wherever a module's config has that setting; yields whether any was changed."""
    found: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen and hasattr(config, _EXPERTS_SETTING):
            seen.add(id(config))
            found.append((config, getattr(config, _EXPERTS_SETTING)))
    try:
        for config, _ in found:
            setattr(config, _EXPERTS_SETTING, implementation)
        yield any(before not in (None, implementation) for _, before in found)
    finally:
        for config, before in found:
            setattr(config, _EXPERTS_SETTING, before)


def _contents_of(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in vars(module).values() if isinstance(value, _MUTABLE)]


def _put_back(holder: Any, content: Any) -> None:
    if len(holder) == len(content) and all(a is b for a, b in zip(_items(holder), _items(content), strict=True)):
        return
    holder.clear()
    if isinstance(holder, (dict, set)):
        holder.update(content)
    else:
        holder.extend(content)


def _items(holder: Any) -> list[Any]:
    return [*holder.keys(), *holder.values()] if isinstance(holder, dict) else list(holder)
