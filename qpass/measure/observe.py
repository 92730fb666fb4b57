"""Observe: two models in, the outputs of their matching layers out, call by call, by hooks that are taken off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from qpass.errors import EvaluationError
from qpass.layers.packed_layers import PackedWeight
from qpass.layers.quant_weight import QuantWeight
from qpass.layers.tied_table import TiedTable
from qpass.measure.watch_products import SeenProduct, WatchProducts


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceLayer:
    """The reference's side of one packed weight: the module that is the product, or a parameter in a bigger forward."""

    module: nn.Module | None
    weight: Tensor | None
    transposed: bool

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the reference's layer makes of `x`."""
        if self.module is not None:
            held = next((t for t in self.module.parameters()), x)
            return self.module.forward(x.to(held.device, held.dtype))  # type: ignore[no-any-return]
        assert self.weight is not None
        weight = self.weight.t() if self.transposed else self.weight
        return F.linear(x.to(weight.device, weight.dtype), weight, None if bias is None else bias.to(weight))


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of a reference layer; `biased` is False where the bias is added outside of it."""

    value: Tensor
    biased: bool


class Meter(Protocol):
    """Takes one call's output, what the reference layer makes of the same input, and what the reference model had."""

    def add(self, got: Tensor, local: Tensor, accumulated: Tensor) -> None: ...


Pairs = Mapping[str, tuple[PackedWeight, ReferenceLayer]]


def pair_layers(reference: nn.Module, model: nn.Module) -> Pairs:
    """Each packed weight of `model`, by name, with its place in `reference`; EvaluationError if it has none there."""
    packed = {name: module for name, module in model.named_modules()
              if isinstance(module, PackedWeight) and not isinstance(module, TiedTable)}
    pairs = {}
    for name, module in packed.items():
        owner, _, leaf = name.rpartition(".")
        try:
            if isinstance(module, QuantWeight):
                held = getattr(reference.get_submodule(owner), leaf)
                weight = held.dequantize() if isinstance(held, PackedWeight) else held.detach()
                found = ReferenceLayer(module=None, weight=weight, transposed=module.transposed)
            else:
                found = ReferenceLayer(module=reference.get_submodule(name), weight=None, transposed=False)
        except AttributeError as error:
            raise EvaluationError(f"the reference has nothing at {name!r}, which is quantized in the model; compare "
                                  "needs the float model that was quantized") from error
        pairs[name] = (module, found)
    return pairs


def observe_reference(reference: nn.Module, pairs: Pairs, hooks: ExitStack) -> dict[str, list[Output]]:
    """Keep the output of every paired layer of `reference` while `hooks` is open."""
    kept: dict[str, list[Output]] = {name: [] for name in pairs}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: kept[name].append(Output(value=output.detach().clone(), biased=True))

    def keep_product(name: str, product: SeenProduct) -> None:
        kept[name].append(Output(value=product.output.detach().clone(), biased=product.biased))

    weights = {}
    for name, (_, layer) in pairs.items():
        if layer.module is not None:
            handle = layer.module.register_forward_hook(keep(name), always_call=False)
            hooks.callback(handle.remove)
        elif layer.weight is not None:
            weights[name] = layer.weight
    if weights:
        hooks.enter_context(WatchProducts(weights, keep_product))
    return kept


def observe_model(pairs: Pairs, meters: Mapping[str, Meter], kept: Mapping[str, list[Output]],
                  hooks: ExitStack) -> list[str]:
    """Hand each call of a packed weight to its meter while `hooks` is open. Returns the names in order of execution."""
    order: list[str] = []

    def watch(name: str, packed: PackedWeight, layer: ReferenceLayer) -> Callable[[Tensor, Tensor | None], Tensor]:
        multiply, queue = packed.multiply, iter(kept[name])

        def watched(x: Tensor, bias: Tensor | None = None) -> Tensor:
            y = multiply(x, bias)
            want = next(queue, None)
            if want is None:
                raise EvaluationError(f"{name} is called more often in the model than in the reference; are these two "
                                      "the same model?")
            if name not in order:
                order.append(name)
            local = layer.product(x, bias)
            if want.biased or bias is None:
                accumulated = want.value
            else:
                accumulated = want.value.float() + bias.float().to(want.value.device)
            meters[name].add(y, local.reshape(y.shape), accumulated.reshape(y.shape))
            return y

        return watched

    for name, (packed, layer) in pairs.items():
        # An attribute of the instance hides the method of the class, and is gone when the block ends.
        packed.__dict__["multiply"] = watch(name, packed, layer)
        hooks.callback(packed.__dict__.pop, "multiply")
    return order
