"""Activation args: what an activation is rounded to, as data, and the words in which names and reports say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qpass.errors import RecipeError

Granularity = Literal["per_tensor", "per_channel", "per_group", "per_block", "per_token"]


@dataclass(frozen=True, kw_only=True)
class ActivationArgs:
    """The numbers an activation is rounded to just before the product.

    type         "int", or "float": 8 bits are e4m3, 4 bits e2m1
    granularity  per_token: a scale for each row; per_group: one for each `group_size` inputs of a row; per_tensor: one
    dynamic      True: scales are computed from the activation itself. False: they are tensors of the layer, loaded or
                 calibrated. "local": those of the groups are computed, below one of the layer (NVFP4)

    Not all that can be said is computed on every machine: a kernel refuses, and the recipe's policy decides.
    """

    bits: int = 8
    type: Literal["int", "float"] = "int"
    granularity: Granularity = "per_token"
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = True

    def __post_init__(self) -> None:
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.type not in ("int", "float") or self.bits not in (4, 8):
            raise RecipeError(f"activations can be of type int or float with 4 or 8 bits, got {self.type!r} with "
                              f"{self.bits}")
        if self.granularity not in ("per_token", "per_tensor", "per_group"):
            raise RecipeError("activation granularity must be per_token, per_tensor or per_group, "
                              f"got {self.granularity!r}")
        if (self.granularity == "per_group") != (self.group_size is not None) or (self.group_size or 1) < 1:
            raise RecipeError("the group_size of an activation goes with granularity='per_group', and only with it; "
                              f"got {self.granularity!r} and group_size={self.group_size}")
        if self.type == "float" and not self.symmetric:
            raise RecipeError("float activations have no zero point: symmetric must be True")
        if self.dynamic is False and self.granularity != "per_tensor":
            raise RecipeError("static activation scales are one for the tensor: granularity='per_tensor' goes with "
                              f"dynamic=False, got {self.granularity!r}")
        if self.dynamic not in (True, False, "local") or (self.dynamic == "local" and self.granularity != "per_group"):
            raise RecipeError("dynamic must be True, False, or 'local' with granularity='per_group'; got "
                              f"{self.dynamic!r} with {self.granularity!r}")

    @property
    def static(self) -> bool:
        """Whether the scale is a tensor of the layer."""
        return self.dynamic is False

    @property
    def number(self) -> str:
        """`int8`, `int4`, `fp8` or `fp4`."""
        return f"{'int' if self.type == 'int' else 'fp'}{self.bits}"


def activation_words(activation: ActivationArgs) -> tuple[str, ...]:
    """How an activation differs from dynamic, per token and symmetric: `("static", "asym")`, `("g32",)`."""
    group = f"g{activation.group_size}" if activation.group_size else activation.granularity.removeprefix("per_")
    when = "static" if activation.static else "local" if activation.dynamic == "local" else ""
    return tuple(word for word in ("" if group == "token" or when == "static" else group, when,
                                   "" if activation.symmetric else "asym") if word)
