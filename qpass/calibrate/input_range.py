"""Input range: what comes to a layer in, its smallest and largest value out, and the static scale made of them.

The range over all calibration inputs is minmax, as LLM Compressor's observer of that name. A narrower one clips rare
large values and rounds all others finer: the range that holds a percentile of the values, or the one with the smallest
squared error, both found on a histogram of the input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.activation_scale import ActivationScale, scale_of_range
from qpass.errors import CalibrationError

_BINS, _STEPS = 2048, 80


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

    def narrow(self, name: str, low: float, high: float) -> None:
        """Take this range in place of the one seen."""
        self._seen[name] = (low, high)

    def of(self, name: str) -> tuple[float, float]:
        """Smallest and largest value seen."""
        return self._seen[name]


class Histograms:
    """How often each site's input fell into each of equal bins of its range."""

    def __init__(self, ranges: InputRanges) -> None:
        self.ranges = ranges
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Count `x`, of any shape."""
        low, high = self.ranges.of(name)
        if math.isfinite(low) and math.isfinite(high) and low < high:
            seen = torch.histc(x.float(), bins=_BINS, min=low, max=high).double().cpu()
            self.counts[name] = self.counts.get(name, torch.zeros(())) + seen

    def narrow(self, method: str, percentile: float, activation: dict[str, ActivationArgs]) -> None:
        """Give each range counted here the one that `method` ("percentile" or "mse") finds."""
        for name, counts in self.counts.items():
            low, high = self.ranges.of(name)
            centers = low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (high - low) / _BINS
            found = (_percentile(centers, counts, percentile) if method == "percentile" else
                     _least_error(centers, counts, low, high, activation[name]))
            self.ranges.narrow(name, *found)


def _percentile(centers: Tensor, counts: Tensor, percentile: float) -> tuple[float, float]:
    """The middle range that holds `percentile` per cent of the values."""
    share = counts.cumsum(0) / counts.sum()
    tail = (1 - percentile / 100) / 2
    first, last = int((share <= tail).sum()), int((share < 1 - tail).sum())
    return float(centers[min(first, _BINS - 1)]), float(centers[min(last, _BINS - 1)])


def _least_error(centers: Tensor, counts: Tensor, low: float, high: float, activation: ActivationArgs
                 ) -> tuple[float, float]:
    """The range, shrunk about 0 in steps, whose rounding changes the values least."""
    best, found = math.inf, (low, high)
    for step in range(_STEPS, 0, -1):
        part = step / _STEPS
        scale = scale_of_range(low * part, high * part, activation, torch.float32)
        size = scale.scale.double()
        zero = 0.0 if scale.zero_point is None else scale.zero_point.double()
        q = ((centers / size).round() + zero).clamp(-128, 127) - zero
        error = float((counts * (q * size - centers).square()).sum())
        if error < best:
            best, found = error, (low * part, high * part)
    return found
