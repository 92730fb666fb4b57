"""Watch products: parameters in; while a model runs, each matrix product that reads one out, with its operand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_OPERANDS = {_aten.mm.default: (0, 1), _aten.addmm.default: (1, 2), _aten.bmm.default: (0, 1),
             _aten.linear.default: (0, 1), _aten.matmul.default: (0, 1)}
_WITH_BIAS = (_aten.addmm.default,)


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenProduct:
    """One product: its input with one row a token, its output as it came, and whether that has a bias added."""

    x: Tensor
    output: Tensor
    biased: bool


class WatchProducts(TorchDispatchMode):
    """A context in which `see(name, product)` is told of every product that reads the memory of `weights[name]`, and
    `before(name, x)` of its input before it is computed."""

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[str, SeenProduct], None],
                 before: Callable[[str, Tensor], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        self.see, self.before = see, before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first, found = _OPERANDS.get(func), []
        for mine, other in () if first is None else (first, first[::-1]):
            name = self.names.get(args[mine].untyped_storage().data_ptr())
            if name is not None:
                x = args[other].mT if mine < other else args[other]  # W @ x has its rows in columns
                found.append((name, x))
                if self.before is not None:
                    self.before(name, x)
        output = func(*args, **(kwargs or {}))
        for name, x in found:
            self.see(name, SeenProduct(x=x, output=output, biased=func in _WITH_BIAS))
        return output
