"""bitsandbytes: nf4 and fp4 with or without double quantization, and int8, as Transformers saves them.

Source: bitsandbytes 0.50, functional.py (QuantState.as_dict, dequantize_4bit, int8_vectorwise_dequant).
4 bits  `weight` the bytes of two codes each, the even element in the high nibble, `weight.absmax`, `weight.quant_map`
        float32 [16], `weight.quant_state.bitsandbytes__nf4` (or fp4) JSON bytes; absmax is itself 8-bit under double
        quantization: nested_quant_map[absmax] * nested_absmax[j // nested_blocksize] + nested_offset
8 bits  `weight` int8 [N, K] and `SCB` float32 [N]: w = (q * SCB) * (1 / 127), in that order. Outlier columns are chosen
        from activations at run time, and kept in float; here every column of an activation is
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from qpass.codecs.fp8 import SCALES
from qpass.errors import CheckpointError
from qpass.formats.codec_reads import check_scale, codec_read, spec_of
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

STATE = "quant_state.bitsandbytes__"
BLOCKS = tuple(1 << bits for bits in range(5, 13))  # 32 to 4096, what the tool can make
_LARGEST_STATE = 1 << 16


class BitsAndBytesReader(Reader):
    """What is quantized is what has a `quant_state` or an `SCB` beside it."""

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        tensors = self.checkpoint.tensors
        kind = next((kind for kind in ("nf4", "fp4") if f"{place.path}.weight.{STATE}{kind}" in tensors), None)
        if kind is not None:
            return self._four_bits(place, kind)
        if f"{place.path}.SCB" in tensors:
            names = {"weight": f"{place.path}.weight", "absmax": f"{place.path}.SCB"}
            return codec_read(self.checkpoint, place.path, WeightArgs(bits=8, type="int8_absmax"), place.shape, names,
                              note="every activation stays in the model's dtype, and not only its outliers")
        return None

    def _four_bits(self, place: Place, kind: str) -> WeightRead:
        count = 1
        for size in place.shape:
            count *= size
        prefix = f"{place.path}.weight"
        names = {"weight": prefix, "absmax": f"{prefix}.absmax", "code": f"{prefix}.quant_map",
                 "state": f"{prefix}.{STATE}{kind}"}
        need = self.checkpoint.need
        stored = {short: self.checkpoint.tensors[need(full, of=place.path)] for short, full in names.items()}
        blocks = stored["absmax"].shape[0] if len(stored["absmax"].shape) == 1 else 0
        block = next((size for size in BLOCKS if -(-count // size) == blocks), None)
        if len(place.shape) != 2 or stored["weight"].nbytes != -(-count // 2) or block is None:
            raise CheckpointError(f"{prefix} in {stored['weight'].file} is {stored['weight']} with {blocks} scales, "
                                  f"which does not make up {list(place.shape)}")
        if stored["absmax"].dtype == "uint8":
            for short in ("nested_absmax", "nested_quant_map"):
                names[short] = need(f"{prefix}.{short}", of=place.path, dtype=SCALES)
            need(names["nested_quant_map"], of=place.path, shape=(256,))
        if stored["state"].nbytes > _LARGEST_STATE:
            raise CheckpointError(f"{names['state']} in {stored['state'].file} has {stored['state'].nbytes} bytes")
        need(names["code"], of=place.path, dtype="float32", shape=(16,))
        args = WeightArgs(bits=4, type=kind, granularity="per_group", group_size=block)
        return WeightRead(spec=spec_of(args, place.shape), tensors=names, read=_read_four_bits)

    def shape_of(self, path: str) -> tuple[int, int] | None:
        stored = self.checkpoint.tensors.get(f"{path}.weight")
        if f"{path}.SCB" in self.checkpoint.tensors and stored is not None and len(stored.shape) == 2:
            return stored.shape[0], stored.shape[1]
        for kind in ("nf4", "fp4"):  # whose bytes lie flat: only the state, some hundred bytes, knows the shape
            name = f"{path}.weight.{STATE}{kind}"
            if name in self.checkpoint.tensors and self.checkpoint.tensors[name].nbytes <= _LARGEST_STATE:
                try:
                    said = _state(self.checkpoint.raw(name)).get("shape", ())
                except ValueError as error:
                    raise CheckpointError(f"{name} in {self.checkpoint.path}: {error}") from error
                if len(said) == 2 and all(isinstance(size, int) and size > 0 for size in said):
                    return said[0], said[1]
        return None

    def leftover(self, name: str) -> str | None:
        return "says that rows stand one after the other" if name.endswith(".weight_format") else None


def _read_four_bits(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    state = _state(bytes(tensors["state"].reshape(-1).view(torch.uint8).tolist()))
    said = (state.get("quant_type"), state.get("blocksize"), tuple(state.get("shape", ())))
    if said != (spec.weight.type, spec.group_size, spec.shape):
        raise ValueError(f"quant_state says {said[0]}, blocks of {said[1]}, {list(said[2])}; the tensors are "
                         f"{spec.weight.type}, blocks of {spec.group_size}, {list(spec.shape)}")
    absmax = tensors["absmax"]
    if absmax.dtype == torch.uint8:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        nested = tensors["nested_absmax"]
        if not isinstance(size, int) or not isinstance(offset, float | int) or size < 1 or (
                nested.numel() != -(-absmax.numel() // size)):
            raise ValueError(f"quant_state has nested_blocksize {size} and nested_offset {offset} for {absmax.numel()} "
                             f"scales and {nested.numel()} scales of scales")
        block = torch.arange(absmax.numel(), device=absmax.device) // size
        absmax = tensors["nested_quant_map"].float()[absmax.int()] * nested.float().reshape(-1)[block] + offset
    absmax = absmax.float()
    for name, tensor in (("absmax", absmax), ("quant_map", tensors["code"])):
        check_scale(tensor, name)
    packed = tensors["weight"].contiguous().reshape(-1).view(torch.uint8)  # quant_storage may call the bytes bf16
    return CanonicalWeight({"packed": packed, "absmax": absmax, "code": tensors["code"]})


def _state(raw: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"quant_state is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("shape", []), list):
        raise ValueError("quant_state does not hold the fields of one")
    return found


register_format(Format(
    name="bitsandbytes", title="bitsandbytes", methods=("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    reader=BitsAndBytesReader, reads="nf4, fp4, double quantization, int8", runs="as stored"))
