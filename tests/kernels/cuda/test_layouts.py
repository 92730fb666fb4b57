"""The layout of the CUDA kernels: packing loses nothing, rows can be taken alone, integer scales are found."""

from __future__ import annotations

import pytest
import torch

from qpass.errors import WeightError
from qpass.kernels.cuda.layouts import CUDA_TILES, INTEGER_ROWS, channels_of, from_tiles, names, plain_scale, to_tiles
from qpass.weight import CanonicalWeight, dequantize_weight, quantize_weight
from tests.kernels.cuda.products import INT8, INT8_ASYM, spec_for, weight_args

WEIGHTS = ("int4:g32", "int4:g32:asym", "int4:channel", "int2:g64:asym", "int3:tensor", "int8:channel", "int8:g32:asym",
           "int6:g64", "int4:g32:integer", "mxfp4:g32", "nvfp4:g16", "nvfp4_mul:g16", "nvfp4_reciprocal:g16",
           "mxfp8:g32", "nf4:g64", "fp4:g64", "fp8:channel", "fp8:tensor", "fp8:b128", "fp8:g64")


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize(("n", "k"), [(1, 64), (45, 192), (16, 320)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_pack_then_unpack_gives_the_same_bits(text: str, n: int, k: int, dtype: torch.dtype) -> None:
    for activation in (None, INT8, INT8_ASYM) if text.startswith("int") else (None,):
        spec = spec_for(weight_args(text), activation, n, k)
        weight = quantize_weight((torch.randn(n, k) + 0.3).to(dtype), spec)
        packed = CUDA_TILES.pack(weight, spec)
        assert tuple(packed) == names(spec) or set(packed) == set(names(spec))
        back = CUDA_TILES.unpack(packed, spec)
        assert set(back.tensors) == set(weight.tensors)
        for name, tensor in weight.tensors.items():
            found = back.tensors[name]
            assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("text", ["int4:g32:asym", "int8:channel", "int4:g64"])
def test_rows_alone_are_those_of_the_whole(text: str) -> None:
    spec = spec_for(weight_args(text), None, 45, 192)
    packed = CUDA_TILES.pack(quantize_weight(torch.randn(45, 192), spec), spec)
    ids = torch.tensor([44, 0, 17, 17])
    assert CUDA_TILES.rows is not None
    some = dequantize_weight(CUDA_TILES.rows(packed, spec, ids), spec)
    assert torch.equal(some, dequantize_weight(CUDA_TILES.unpack(packed, spec), spec)[ids])


def test_tiles_hold_inputs_j_and_j_plus_32_in_a_byte() -> None:
    codes = torch.arange(20 * 100).view(20, 100).remainder(16).to(torch.uint8)
    tiles = to_tiles(codes)
    assert tiles.shape == (2, 2, 16, 32) and tiles.is_contiguous()
    assert int(tiles[1, 0, 3, 5]) == int(codes[19, 5]) | int(codes[19, 37]) << 4
    assert torch.equal(from_tiles(tiles, 20, 100), codes)


def test_integer_scales_become_multipliers() -> None:
    spec = spec_for(weight_args("int4:g32:integer"), INT8, 20, 128)
    weight = quantize_weight(torch.randn(20, 128).bfloat16(), spec)
    scale = CUDA_TILES.pack(weight, spec)["scale"]
    assert scale.dtype == torch.int8 and scale.shape == (INTEGER_ROWS + 4, 32)
    assert torch.equal((scale[INTEGER_ROWS:] * channels_of(scale)).to(torch.bfloat16)[:, :20].t(), weight.scale)
    assert plain_scale(scale).dtype == torch.bfloat16 and CUDA_TILES.even is not None
    assert CUDA_TILES.even(CUDA_TILES.pack(weight, spec), spec)["scale"].shape == (4, 32)
    float_only = spec_for(weight_args("int4:g32:integer"), None, 20, 128)
    assert CUDA_TILES.pack(weight, float_only)["scale"].dtype == torch.bfloat16


def test_e5m2_weights_do_not_meet_float8_activations() -> None:
    from tests.kernels.cuda.products import FP8

    spec = spec_for(weight_args("fp8:channel"), FP8, 4, 32)
    weight = CanonicalWeight({"weight": torch.randn(4, 32).to(torch.float8_e5m2), "scale": torch.ones(4, 1)})
    with pytest.raises(WeightError, match="take float8_e4m3fn weights, not float8_e5m2"):
        CUDA_TILES.pack(weight, spec)
