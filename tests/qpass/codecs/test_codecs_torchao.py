"""Codecs against torchao: its float8 and nf4 functions give our codes and scales from the same float weight."""

from __future__ import annotations

import pytest
import torch

from qpass.codecs.fp8 import Fp8, spread
from qpass.scheme import RowCodec, WeightArgs, codec_of

primitives = pytest.importorskip("torchao.quantization.quant_primitives")


@pytest.mark.parametrize("granularity", ["per_channel", "per_block"])
def test_float8(granularity: str) -> None:
    args = WeightArgs(bits=8, type="fp8", granularity=granularity,  # type: ignore[arg-type]
                      group_size=128 if granularity == "per_block" else None)
    weight = torch.randn(256, 384) * torch.logspace(-6, 3, 256)[:, None]
    weight[3, 1:] = 0
    made = Fp8().encode(weight, args, torch.float32)
    block = (128, 128) if granularity == "per_block" else (1, 384)
    scale = primitives._choose_scale_float8(weight, block, float8_dtype=torch.float8_e4m3fn)
    torch.testing.assert_close(made["scale"], scale.reshape(made["scale"].shape), rtol=1e-7, atol=0)
    codes = primitives._quantize_affine_float8(weight, spread(made["scale"], args, slice(0, 256), 384))
    assert torch.equal(codes.view(torch.uint8), made["weight"].view(torch.uint8))


def test_nf4() -> None:
    theirs = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").NF4Tensor
    args = WeightArgs(bits=4, type="nf4", granularity="per_group", group_size=64)
    weight = torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]
    weight[5] = 0
    codec = codec_of(args)
    assert isinstance(codec, RowCodec)
    made = codec.encode(weight, args, torch.float32)
    codes = torch.stack([made["packed"] >> 4, made["packed"] & 15], -1).view(-1, 64)
    assert torch.equal(made["absmax"], weight.view(-1, 64).abs().amax(-1))
    scaled = weight.view(-1, 64) / made["absmax"].clamp_min(1e-38)[:, None]
    nearest = theirs.quantize_tensor_nearest(scaled.flatten(), made["code"]).view(-1, 64)
    assert torch.equal(codes.long(), nearest.long())
