"""Module places: a model and one of its modules or parameters in; where it stands out, or another put there.

A module, and a parameter, may stand under several names. `nn.Module.modules()` makes up the name of each module on its
way; done for each layer, that is a tenth of the time of loading a model.
"""

from __future__ import annotations

from torch import nn


def put_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace `old` wherever it is registered below `model`."""
    for parent in _modules(model):
        if parent._modules:
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new


def holders(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every (module, name) that holds this very parameter, in the order of `model.modules()`; more than one if it is
    tied."""
    return [(module, name) for module in _modules(model) if module._parameters
            for name, held in module._parameters.items() if held is parameter]


def _modules(model: nn.Module) -> list[nn.Module]:
    """Each module once, in the order of `model.modules()`; a list, for a generator takes twice as long."""
    seen: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen[module] = None
            if module._modules:
                waiting += reversed(module._modules.values())
    return list(seen)
