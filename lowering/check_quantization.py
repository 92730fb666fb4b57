"""Check quantization: the integers of an exposed quantization and their source in; an error if they differ."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import LoweringError
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_static, quantize_symmetric
from qpass.spec import LinearSpec


def check_quantization(xq: Tensor, x_scale: Tensor, source: Tensor, x_zero_point: Tensor | None, spec: LinearSpec,
                       site: str) -> None:
    """Raises LoweringError, naming `site`, if codes are off by more than one step or scales by more than rounding."""
    if spec.activation is not None and spec.activation.static:
        one = x_scale.flatten()[:1], None if x_zero_point is None else x_zero_point.flatten()[:1]
        expected: tuple[Tensor, ...] = (quantize_static(source, *one), x_scale)
    else:
        expected = quantize_symmetric(source) if x_zero_point is None else quantize_asymmetric(source)
    codes, scale = expected[0].reshape(xq.shape), expected[1].reshape(x_scale.shape)
    finite = source.isfinite().all(-1).reshape(x_scale.shape[:-1])
    apart = (codes.int() - xq.int()).abs()[finite]
    # One step: a compiler may keep the producer in float32 where the tensor itself is rounded to 8 bits of mantissa.
    if bool((apart > 1).any()) or not torch.allclose(x_scale[finite], scale[finite], rtol=2**-7):
        raise LoweringError(f"the activation quantization written out before {site!r} differs from the reference by "
                            f"more than one step; switch it off with disable_pass('expose_activation_quant')")
