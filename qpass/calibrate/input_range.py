"""Input range: what comes to a layer in, its smallest and largest value out, and the static scale made of them.

The range over all calibration inputs is minmax, as LLM Compressor's observer of that name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.activation_scale import ActivationScale, scale_of_range
from qpass.errors import CalibrationError


class InputRanges:
    """The range of each site's input so far. A NaN stays: it is never hidden by numbers before or after it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Widen the range of `name` to hold `x`, of any shape."""
        if x.numel() == 0:
            return
        low, high = (float(value) for value in x.aminmax())
        before = self._seen.get(name, (low, high))
        if math.isnan(before[0]) or math.isnan(low):
            self._seen[name] = (math.nan, math.nan)
        else:
            self._seen[name] = (min(before[0], low), max(before[1], high))

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def scale(self, name: str, activation: ActivationArgs, dtype: torch.dtype) -> ActivationScale:
        """The static scale of `name`, stored in `dtype`. Raises CalibrationError if its input was NaN or Inf."""
        low, high = self._seen[name]
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(f"the input of {name} was NaN or Inf during calibration; look for the sample that "
                                   "causes it, or give the layer a dynamic scheme")
        return scale_of_range(low, high, activation, dtype)
