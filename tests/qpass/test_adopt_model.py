"""Adopt: models that torchao quantized keep their numbers on our layers, and run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import CheckpointError

quantization = pytest.importorskip("torchao.quantization")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 64, bias=False)).eval().bfloat16()


CONFIGS: dict[str, Any] = {
    "int8wo": quantization.Int8WeightOnlyConfig(version=2),
    "int8dq": quantization.Int8DynamicActivationInt8WeightConfig(version=2),
    "fp8wo": quantization.Float8WeightOnlyConfig(version=2),
    "intx4wo": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
    "int8da-intx4": quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_torchaos(name: str) -> None:
    live, x = model(), torch.randn(5, 128).bfloat16()
    quantization.quantize_(live, CONFIGS[name])
    weights = [live[i].weight.dequantize().float() for i in (0, 2)]  # type: ignore[operator]
    with torch.no_grad():
        before = live(x).float()
        assert qpass.adopt(live) is live
        after = live(x).float()
    for layer, weight in zip((live[0], live[2]), weights, strict=True):
        assert torch.equal(layer.dequantize(torch.float32).bfloat16().float(), weight)  # type: ignore[operator]
    assert (after - before).abs().max() < 0.03 * before.abs().max()


def test_a_model_without_any_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no linear layer that torchao quantized"):
        qpass.adopt(model())
