"""Round weight: a float weight in; rounded to nearest, and packed at once where the layout of its kernel can, out."""

from __future__ import annotations

from torch import Tensor

from qpass.kernels.layout import Packed
from qpass.kernels.registry import kernel
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight


def quantized(weight: Tensor, spec: LinearSpec, into: Packed | None = None, largest: Tensor | None = None,
              *, finite: bool = False) -> CanonicalWeight | Packed:
    """`weight` [N, K] rounded to nearest, and packed at once if the kernel's layout can: then, where they fit, in the
    tensors of `into` instead of new ones. `largest` as of quantize_weight. NaN and Inf count as 0; if `finite`, what is
    packed at once raises NonFinite for them, at the end."""
    faster = kernel(spec.kernel).layout.quantize
    packed = None if faster is None else faster(weight, spec, into, largest, finite)
    return quantize_weight(weight, spec, largest=largest) if packed is None else packed


def known_largest(weight: Tensor, spec: LinearSpec) -> Tensor | None:
    """The largest magnitude in `weight`, float32 [], Inf or NaN if it holds one, where the kernel's layout finds it
    faster than plain torch would; else None."""
    largest = kernel(spec.kernel).layout.largest
    return None if largest is None else largest(weight.detach())


def known_finite(weight: Tensor, spec: LinearSpec) -> bool:
    """Whether it is known from `known_largest` that `weight` holds neither NaN nor Inf; False leaves it open."""
    largest = known_largest(weight, spec)
    return largest is not None and bool(largest.isfinite())
