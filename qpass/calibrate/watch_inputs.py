"""Watch inputs: the modules and parameters of sites in; while a model runs, the name and the input of each out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from qpass.measure.watch_products import WatchProducts

OnInput = Callable[[str, Tensor], None]


@contextmanager
def watch_inputs(modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor],
                 on_input: OnInput) -> Iterator[None]:
    """Within, `on_input(name, x)` gets x [..., K] of each call of `modules[name]`, by position or by keyword, and of
    each product with `parameters[name]` inside a bigger forward."""
    with ExitStack() as watching:
        for name, module in modules.items():
            watching.callback(module.register_forward_pre_hook(_hook(name, on_input), with_kwargs=True).remove)
        if parameters:
            watching.enter_context(WatchProducts(parameters, lambda name, product: on_input(name, product.x)))
        yield


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer with one input was called with."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _hook(name: str, on_input: OnInput) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_input(name, input_of(args, kwargs))

    return hook
