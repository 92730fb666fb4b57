"""Round weight: a float weight in; rounded to nearest, and packed at once where the layout of its kernel can, out."""

from __future__ import annotations

from torch import Tensor

from qpass.kernels.layout import Packed
from qpass.kernels.registry import kernel
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight


def quantized(weight: Tensor, spec: LinearSpec, into: Packed | None = None, largest: Tensor | None = None
              ) -> CanonicalWeight | Packed:
    """`weight` [N, K] rounded to nearest, and packed at once if the kernel's layout can: then, where they fit, in the
    tensors of `into` instead of new ones. `largest` as of quantize_weight."""
    faster = kernel(spec.kernel).layout.quantize
    packed = None if faster is None else faster(weight, spec, into, largest)
    return quantize_weight(weight, spec, largest=largest) if packed is None else packed


def known_finite(weight: Tensor, spec: LinearSpec) -> bool:
    """Whether the kernel's layout can say that `weight` holds neither NaN nor Inf, as it does faster than check_weight;
    False leaves it open."""
    finite = kernel(spec.kernel).layout.finite
    return finite is not None and finite(weight.detach()) is True
