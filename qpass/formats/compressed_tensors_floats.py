"""compressed-tensors floats: the `weights` of a config group, of type float, to WeightArgs of a codec, and back.

Source: compressed-tensors 0.20, config/base.py and quantization/quant_scheme.py. The codecs' tensors have the names and
packing of its formats, so that nothing is repacked: float-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized,
mxfp6-pack-quantized, mxfp8-quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpass.scheme import WeightArgs

FLOAT_FORMATS = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized",
                 "mxfp6_e2m3": "mxfp6-pack-quantized", "mxfp8": "mxfp8-quantized"}
_MICROSCALING = {4: "mxfp4", 6: "mxfp6_e2m3", 8: "mxfp8"}
_STRATEGY = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_block": "block"}


def float_args(raw: Mapping[str, Any]) -> WeightArgs:
    """The numbers that a group's `weights` ask for. Raises ValueError, saying which, for those that no codec has."""
    bits, strategy, size = raw.get("num_bits"), raw.get("strategy"), raw.get("group_size")
    if strategy == "tensor_group" or (bits == 4 and size == 16):
        if bits != 4 or size not in (16, None):
            raise ValueError(f"float{bits} in tensor groups of {size}; nvfp4 has 4 bits in groups of 16")
        return WeightArgs(bits=4, type="nvfp4", granularity="per_group", group_size=16)
    if bits in _MICROSCALING and size == 32 and (bits != 8 or "uint8" in str(raw.get("scale_dtype"))):
        return WeightArgs(bits=bits, type=_MICROSCALING[bits], granularity="per_group", group_size=32)
    if bits != 8:
        raise ValueError(f"float{bits} with strategy {strategy!r} and group size {size}")
    if strategy == "block":
        block = raw.get("block_structure")
        if not isinstance(block, list | tuple) or len(block) != 2 or block[0] != block[1] or not (
                isinstance(block[0], int) and 0 < block[0] <= 1 << 20):
            raise ValueError(f"block_structure {block!r}; square blocks are read")
        return WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=block[0])
    if strategy == "group":
        return WeightArgs(bits=8, type="fp8", granularity="per_group", group_size=size)
    return WeightArgs(bits=8, type="fp8", granularity="per_tensor" if strategy in ("tensor", None) else "per_channel")


def float_fields(args: WeightArgs) -> dict[str, Any]:
    """The inverse, for a codec that has a format of its own."""
    scale = {"nvfp4": "torch.float8_e4m3fn", "fp8": None}.get(args.type, "torch.uint8")
    block = args.granularity == "per_block"
    return {"num_bits": args.bits, "type": "float", "symmetric": True, "dynamic": False, "actorder": None,
            "strategy": "tensor_group" if args.type == "nvfp4" else _STRATEGY[args.granularity],
            "group_size": None if block else args.group_size, "scale_dtype": scale,
            "block_structure": [args.group_size, args.group_size] if block else None}
