"""Codecs against compressed-tensors: the same codes and scales, bit for bit, from the same float weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpass.codecs.elements import unpack_nibbles
from qpass.formats.compressed_tensors_floats import float_args, float_fields
from qpass.scheme import RowCodec, WeightArgs, codec_of, tensor_on_disk

quantization = pytest.importorskip("compressed_tensors.quantization")

PRESETS = {"fp8": "FP8", "fp8_dynamic": "FP8_DYNAMIC", "fp8_block": "FP8_BLOCK", "nvfp4": "NVFP4A16",
           "mxfp4": "MXFP4A16", "mxfp6": "MXFP6A16", "mxfp8": "MXFP8A16"}


def theirs(name: str, weight: torch.Tensor) -> tuple[WeightArgs, dict[str, torch.Tensor], torch.Tensor]:
    """What compressed-tensors stores, and what it reads back."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = quantization.preset_name_to_scheme(PRESETS[name], ["Linear"])
    args: Any = scheme.weights
    state = {"weight": weight}
    shared: dict[str, Any] = {}
    if args.strategy == "tensor_group":
        shared["global_scale"] = state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    view = weight
    if args.strategy == "block":
        rows, columns = args.block_structure
        view = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        view = view.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2).flatten(2)
    elif args.group_size:
        view = weight.unflatten(1, (-1, args.group_size))
    elif args.strategy == "tensor":
        view = weight.reshape(-1)
    keep = args.strategy == "channel"
    scale, _ = calculate_qparams(view.amin(-1, keepdim=keep), view.amax(-1, keepdim=keep), args, **shared)
    state["weight_scale"] = scale.reshape(1) if args.strategy == "tensor" else scale
    ours = float_args(args.model_dump(mode="json"))
    compressor = BaseCompressor.get_value_from_registry({
        "fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized",
        "mxfp6_e2m3": "mxfp6-pack-quantized", "mxfp8": "mxfp8-quantized"}[ours.type])
    stored = compressor.compress(state, scheme)
    return ours, stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize("name", PRESETS)
def test_codes_and_scales_are_theirs(name: str) -> None:
    weight = torch.randn(160, 256) * torch.logspace(-3, 1, 160)[:, None]
    args, stored, decoded = theirs(name, weight)
    codec = codec_of(args)
    assert isinstance(codec, RowCodec)
    made = codec.encode(weight, args, torch.float32)
    for short in codec.names:
        there = stored[tensor_on_disk(short)]
        assert there.dtype == made[short].dtype and there.numel() == made[short].numel(), short
        same = there.reshape(made[short].shape).view(torch.uint8) == made[short].view(torch.uint8)
        assert bool(same.all()), f"{short}: {int((~same).sum())} of {same.numel()} bytes differ"
    tensors = {short: stored[tensor_on_disk(short)].reshape(made[short].shape) for short in codec.names}
    ours = codec.decode(tensors, args, (160, 256), slice(0, 160))
    assert torch.equal(ours.to(decoded.dtype), decoded)


def at_the_edges() -> torch.Tensor:
    """Rows of zeros, powers of two, subnormals, what saturates, ties of subnormals, groups of zeros among others."""
    weight = torch.randn(160, 256)
    weight[0], weight[1], weight[2], weight[3] = 0, -0.0, weight[2] * 1e-38, weight[3] * 1e-42
    weight[4], weight[5] = 2.0 ** torch.arange(-149, 107), -(2.0 ** torch.arange(106, -150, -1))
    weight[6, 1:], weight[7, :32], weight[8], weight[9] = 0, 0, 1e-45, 448
    weight[10], weight[11] = torch.linspace(-464, 464, 256), torch.arange(256) * 2.0**-10
    weight[12] = torch.arange(256) / 32 - 4  # ties of e2m1
    return weight


@pytest.mark.parametrize("huge", [False, True], ids=["", "and huge ones"])
@pytest.mark.parametrize("name", PRESETS)
def test_edges_are_theirs(name: str, huge: bool) -> None:
    """Below 1.75 * 2^127, where compressed-tensors' exponents of MX formats overflow to infinity."""
    weight = at_the_edges()
    if huge:
        weight[20], weight[21, ::32], weight[22] = weight[20] * 1e37, 2.9e38, 1.7 * 2.0**127
    args, stored, decoded = theirs(name, weight)
    codec = codec_of(args)
    assert isinstance(codec, RowCodec)
    made = codec.encode(weight, args, torch.float32)
    for short in codec.names:
        there, here = stored[tensor_on_disk(short)].reshape(made[short].shape), made[short]
        if short == "packed" and "4" in name:  # they drop the sign of zero
            there, here = unpack_nibbles(there), unpack_nibbles(here)
            there, here = torch.where(there == 8, 0, there), torch.where(here == 8, 0, here)
        assert torch.equal(there.view(torch.uint8), here.view(torch.uint8)), short
    assert torch.equal(codec.decode(made, args, (160, 256), slice(0, 160)).to(decoded.dtype), decoded)


@pytest.mark.parametrize("name", PRESETS)
def test_config_there_and_back(name: str) -> None:
    args = float_args({**quantization.preset_name_to_scheme(PRESETS[name], ["Linear"]).weights.model_dump(mode="json")})
    assert float_args(float_fields(args)) == args
    assert quantization.QuantizationArgs(**float_fields(args)).num_bits == args.bits
