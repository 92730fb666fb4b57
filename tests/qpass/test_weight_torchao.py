"""torchao as oracle: its affine dequantization of our integers gives our float weights, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qpass.scheme import PRESETS
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight, quantize_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["w2a16", "w3a16", "w4a8", "w4a16_asym", "w4a8_channel", "w7a16", "w8a8"])
def test_dequantized_weight_is_torchaos(name: str, dtype: torch.dtype) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    scheme = PRESETS[name]
    spec = LinearSpec(family=scheme.family, weight=scheme.weight, activation=scheme.activation, out_features=23,
                      in_features=256)
    made = quantize_weight(torch.randn(23, 256).to(dtype), spec)
    low, high = -(1 << scheme.weight.bits - 1), (1 << scheme.weight.bits - 1) - 1
    want = primitives.dequantize_affine(made.qweight, (1, spec.group_size), made.scale.float(), made.zero_point,
                                        torch.int8, low, high, output_dtype=torch.float32)
    assert torch.equal(dequantize_weight(made, spec), want)
