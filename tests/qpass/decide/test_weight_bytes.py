"""Weight bytes: those of the tensors that quantizing and packing make."""

from __future__ import annotations

import pytest
import torch

from qpass.decide.weight_bytes import packed_bytes, stored_bytes
from qpass.kernels.registry import LinearCall, choose, kernel
from qpass.scheme import PRESETS, Scheme, WeightArgs, preset
from qpass.spec import LinearSpec
from qpass.weight import quantize_weight

CPU = torch.device("cpu")


def spec(name: str | Scheme, n: int, k: int) -> LinearSpec:
    scheme = preset(name) if isinstance(name, str) else name
    return LinearSpec(family=scheme.family, weight=scheme.weight, activation=scheme.activation, out_features=n,
                      in_features=k)


def test_stored_bytes() -> None:
    assert stored_bytes(spec("w4a8", 10, 256), 1, 2) == 10 * 128 + 10 * 2 * 2
    assert stored_bytes(spec("w4a16_asym", 10, 256), 1, 2) == 10 * 128 + 10 * 2 * 2 + 10
    assert stored_bytes(spec("w8a8", 10, 7), 3, 4) == 3 * (70 + 40)
    assert stored_bytes(spec(Scheme(name="t", weight=WeightArgs(bits=8, granularity="per_tensor")), 10, 8), 1, 2) == 82
    assert stored_bytes(spec("w3a16", 1, 128), 1, 2) == 48 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, scheme in PRESETS.items() if scheme.weight.type != "int"])
def test_formats_of_their_own(name: str, dtype: torch.dtype) -> None:
    asked = spec(name, 256, 512)
    made = quantize_weight(torch.randn(256, 512).to(dtype), asked)
    assert stored_bytes(asked, 1, dtype.itemsize) == sum(tensor.nbytes for tensor in made.tensors.values())


@pytest.mark.parametrize("name", ["w3a16", "w4a8", "w6a16", "w8a8", "mxfp6a16", "mxfp4", "nf4", "nvfp4", "fp8_block"])
@pytest.mark.parametrize("forced", ["chosen", "linear_reference"])
def test_in_memory(name: str, forced: str) -> None:
    """But for what layouts pad and keep a row: gains, sums of codes, scales of blocks row by row."""
    asked = spec(name, 512, 1024).weight_only()
    asked = asked.on(choose(LinearCall(spec=asked, device=CPU, dtype=torch.bfloat16)).kernel.name
                     if forced == "chosen" else forced)
    packed = kernel(asked.kernel).layout.pack(quantize_weight(torch.randn(512, 1024).bfloat16(), asked), asked)
    assert sum(tensor.nbytes for tensor in packed.values()) == pytest.approx(packed_bytes(asked, 1, 2), rel=0.02)
