"""Origin: the module that a packed layer took the place of, and the same module with a float weight again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The module that a QuantLinear replaced, its weight gone, and how to give it one again."""

    module: nn.Module
    weight: str
    bias: str | None
    transposed: bool

    def holding(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """The module again, with `weight` as it stores it, [K, N] if transposed, and `bias`."""
        self.module._parameters[self.weight] = weight
        if self.bias is not None:
            self.module._parameters[self.bias] = bias
        return self.module
