"""Codecs against compressed-tensors: the same codes and scales, bit for bit, from the same float weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    scale, zero = calculate_qparams(view.amin(-1, keepdim=keep), view.amax(-1, keepdim=keep), args, **shared)
    state["weight_scale"] = scale.reshape(1) if args.strategy == "tensor" else scale
    state["weight_zero_point"] = zero.reshape(state["weight_scale"].shape)
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


@pytest.mark.parametrize("name", PRESETS)
def test_config_there_and_back(name: str) -> None:
    args = float_args({**quantization.preset_name_to_scheme(PRESETS[name], ["Linear"]).weights.model_dump(mode="json")})
    assert float_args(float_fields(args)) == args
    assert quantization.QuantizationArgs(**float_fields(args)).num_bits == args.bits
