"""Activation scale: the range of a layer's input in, the one scale and zero point it is rounded with out.

Formulas are those of compressed-tensors (`quantization/utils/helpers.py`, calculate_qparams), as for weights:
symmetric   scale = max(|low|, |high|) / 127.5
asymmetric  scale = (max(high, 0) - min(low, 0)) / 255,
            zero_point = clamp(-128 - round(min(low, 0) / scale), -128, 127)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qpass.errors import WeightError
from qpass.scheme import ActivationArgs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationScale:
    """A static scale, as a checkpoint holds it: `input_scale` floating [1], `input_zero_point` int8 [1] or None.

    Raises WeightError for other shapes or dtypes, and for a scale that is not a positive number.
    """

    scale: Tensor
    zero_point: Tensor | None = None

    def __post_init__(self) -> None:
        scale, zero_point = self.scale, self.zero_point
        if tuple(scale.shape) != (1,) or not scale.is_floating_point() or scale.element_size() < 2:
            raise WeightError(f"input_scale is {scale.dtype} {list(scale.shape)}, expected one float of 16 or 32 bits")
        if not scale.is_meta and not 0 < float(scale) < float("inf"):
            raise WeightError(f"input_scale is {float(scale)}, expected a positive number")
        if zero_point is not None and (tuple(zero_point.shape) != (1,) or zero_point.dtype != torch.int8):
            raise WeightError(f"input_zero_point is {zero_point.dtype} {list(zero_point.shape)}, expected one int8")

    def tensors(self) -> dict[str, Tensor]:
        """By the names that compressed-tensors gives them in a checkpoint."""
        found = {"input_scale": self.scale}
        return found if self.zero_point is None else {**found, "input_zero_point": self.zero_point}


def scale_names(activation: ActivationArgs | None) -> tuple[str, ...]:
    """The names of a layer's activation tensors in a checkpoint, without the layer's path; () if it has none."""
    if activation is None or not activation.static:
        return ()
    return ("input_scale",) if activation.symmetric else ("input_scale", "input_zero_point")


def scale_of_range(low: float, high: float, activation: ActivationArgs, dtype: torch.dtype) -> ActivationScale:
    """The scale of an activation that was seen between `low` and `high`; it is rounded to `dtype` before it is used."""
    smallest = torch.finfo(dtype).tiny
    if activation.symmetric:
        found = max(abs(low), abs(high)) / 127.5
        return ActivationScale(scale=torch.tensor([max(found, smallest)], dtype=torch.float64).to(dtype))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor([max((high - low) / 255, smallest)], dtype=torch.float64).to(dtype)
    zero_point = (-128 - (low / scale.double()).round()).clamp(-128, 127).to(torch.int8)
    return ActivationScale(scale=scale, zero_point=zero_point)


def scale_of_tensors(tensors: dict[str, Tensor], activation: ActivationArgs | None) -> ActivationScale | None:
    """The scale among a checkpoint's tensors of one layer; None if the activation is not static.

    Raises WeightError if it is not there, or not what it should be; a symmetric layer's zero point must be zero.
    """
    names = scale_names(activation)
    if not names:
        return None
    if missing := [name for name in names if name not in tensors]:
        raise WeightError(f"{missing[0]} is missing, and the activation is static: its scale comes with the "
                          "checkpoint, or from qpass.quantize(model, recipe, calibration=...)")
    zero_point = tensors.get("input_zero_point")
    if len(names) == 1 and zero_point is not None and bool((zero_point != 0).any()):
        raise WeightError("input_zero_point is not zero, and the scheme says that the activation is symmetric")
    return ActivationScale(scale=tensors["input_scale"].reshape(-1),
                           zero_point=None if zero_point is None or len(names) == 1 else zero_point.reshape(-1))
