"""Quark: AMD's checkpoints, told layer by layer by their tensors and by the weight dtype that the config gives a layer.

Source: amd-quark 0.13, torch/utils/pack.py and export.
    float8 weight, weight_scale                   fp8
    uint8 weight, uint8 weight_scale              mxfp4, or mxfp6 in the element that the config names
    uint8 weight, float8 weight_scale, weight_scale_2   nvfp4, scales multiplied
    int8 weight, weight_scale, weight_zero_point  int8
    int32 weight [K, N / 8], weight_scale [K / G, N], weight_zero_point [K / G, N / 8]
                                                  int4 (two's complement) or uint4
    int32 weight [N, K / 8], weight_scale, weight_scale_2 [N]   int4 by row: w = q * weight_scale_2 * weight_scale
Nibble i of a word is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i] with pack_method "reorder", 8 c + i with "order".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from qpass.dtype import FLOAT8
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.codec_reads import FP8_STATIC, INT8_STATIC, check_scale, spec_of, static_scale
from qpass.formats.float_layer import float_layer, layer_shape
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_REORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_UNUSED = {
    "output_scale": "a scale of the KV cache, which is kept in the model's dtype",
    "input_scale": "a static activation scale; activations stay in the model's dtype or are quantized per token",
    "input_scale_2": "a static activation scale; activations stay in the model's dtype",
    "input_zero_point": "a static activation scale; activations are quantized per token",
    "output_zero_point": "a zero point of the KV cache, which is kept in the model's dtype",
    "weight_zero_point": "zero points of symmetric weights", "weight_zero_point_2": "zero points of symmetric weights",
}


class QuarkReader(Reader):
    """What is quantized is what has a `weight_scale`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.quantization
        self.everywhere = _dtypes(config.get("global_quant_config"))
        self.named = [(pattern, _dtypes(value)) for pattern, value in (config.get("layer_quant_config") or {}).items()]
        export = config.get("export")
        method = export.get("pack_method", "reorder") if isinstance(export, Mapping) else "reorder"
        if method not in ("reorder", "order"):
            raise CheckpointError(f"{checkpoint.path}: pack_method is {method!r}; reorder and order are read")
        self.order = _REORDER if method == "reorder" else tuple(range(8))

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        tensors, path = self.checkpoint.tensors, place.path
        codes = tensors.get(f"{path}.weight")
        if codes is None or f"{path}.weight_scale" not in tensors or len(place.shape) != 2:
            return None
        dtypes = next((found for pattern, found in self.named if fnmatchcase(path, pattern)), self.everywhere)
        static = f"{path}.input_scale" in tensors
        if codes.dtype == "int8":
            return self._int8(place, INT8_STATIC if static else None)
        if codes.dtype == "int32":
            return self._nibbles(place, dtypes[-1] if dtypes else "int4", FP8_STATIC if static else None)
        element = "mxfp6_e2m3" if "fp6_e2m3" in dtypes else "mxfp6_e3m2"
        found = float_layer(self.checkpoint, path, place.shape, factor="weight_scale_2", element=element,
                            activation=FP8_STATIC if static and codes.dtype in FLOAT8 else None)
        if found is None:
            raise CheckpointError(f"{path}.weight in {codes.file} is {codes}: no form of Quark that this version knows")
        return found

    def _int8(self, place: Place, activation: ActivationArgs | None) -> WeightRead:
        path, (n, k) = place.path, place.shape
        self.checkpoint.need(f"{path}.weight", of=path, shape=(n, k))
        scale = self.checkpoint.tensors[f"{path}.weight_scale"]
        groups = max(1, _count(scale.shape) // n)
        if _count(scale.shape) not in (1, n * groups) or k % groups:
            raise CheckpointError(f"{path}.weight_scale in {scale.file} is {list(scale.shape)} for {[n, k]}")
        size = k // groups if groups > 1 else None
        args = WeightArgs(bits=8, granularity="per_group" if size else "per_channel", group_size=size)
        if activation is not None and f"{path}.input_zero_point" in self.checkpoint.tensors:
            activation = replace(activation, symmetric=False)
        names = {name: f"{path}.{name}" for name in ("weight", "weight_scale", "weight_zero_point")
                 if f"{path}.{name}" in self.checkpoint.tensors}
        names |= static_scale(self.checkpoint, path, activation)
        return WeightRead(spec=spec_of(args, place.shape, activation), tensors=names, read=_read_int8)

    def _nibbles(self, place: Place, dtype: str, activation: ActivationArgs | None) -> WeightRead:
        path, (n, k), tensors = place.path, place.shape, self.checkpoint.tensors
        names = {name: f"{path}.{name}" for name in ("weight", "weight_scale", "weight_zero_point", "weight_scale_2")
                 if f"{path}.{name}" in tensors}
        if by_row := "weight_scale_2" in names:
            args = WeightArgs(bits=4)
            names.pop("weight_zero_point", None)
            self.checkpoint.need(names["weight"], of=path, shape=(n, -(-k // 8)))
            self.checkpoint.need(names["weight_scale_2"], of=path, shape=(n,))
        else:
            groups = tensors[names["weight_scale"]].shape[0] if tensors[names["weight_scale"]].shape else 1
            if groups < 1 or k % groups:
                raise CheckpointError(f"{names['weight_scale']} has {groups} groups for {k} inputs")
            args = WeightArgs(bits=4, granularity="per_group", group_size=k // groups, symmetric=dtype == "int4")
            self.checkpoint.need(names["weight"], of=path, shape=(k, -(-n // 8)))
            self.checkpoint.need(names["weight_scale"], of=path, shape=(groups, n))
            if "weight_zero_point" in names:
                self.checkpoint.need(names["weight_zero_point"], of=path, dtype="int32", shape=(groups, -(-n // 8)))
            elif dtype != "int4":
                raise CheckpointError(f"{self.checkpoint.path}: {path} is {dtype} and has no weight_zero_point")
        order = self.order

        def read(found: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
            check_scale(found["weight_scale"], "weight_scale")
            q = _unpack(found["weight"], order, signed=by_row or dtype == "int4")
            if by_row:
                check_scale(found["weight_scale_2"], "weight_scale_2")
                scale = found["weight_scale_2"].float()[:, None] * found["weight_scale"].float()
                return CanonicalWeight({"qweight": q[:, :k].contiguous(), "scale": scale.contiguous()})
            made = {"qweight": q[:, :n].t().contiguous(), "scale": found["weight_scale"].t().contiguous()}
            if "weight_zero_point" in found:
                zero = _unpack(found["weight_zero_point"], order, signed=dtype == "int4")[:, :n].t().contiguous()
                if not spec.weight.symmetric or bool(zero.any()):
                    made["zero_point"] = zero
            return CanonicalWeight(made)

        names |= static_scale(self.checkpoint, path, activation)
        return WeightRead(spec=spec_of(args, place.shape, activation), tensors=names, read=read)

    def shape_of(self, path: str) -> tuple[int, int] | None:
        tensors = self.checkpoint.tensors
        codes, scale = tensors.get(f"{path}.weight"), tensors.get(f"{path}.weight_scale")
        if codes is None or scale is None or len(codes.shape) != 2:
            return None
        if codes.dtype == "int32":
            return (codes.shape[0], codes.shape[1] * 8) if f"{path}.weight_scale_2" in tensors else (
                scale.shape[1] if len(scale.shape) == 2 else codes.shape[1] * 8, codes.shape[0])
        return layer_shape(self.checkpoint, path)

    def leftover(self, name: str) -> str | None:
        return _UNUSED.get(name.rpartition(".")[2])


def _read_int8(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    shape = (spec.out_features, spec.groups)

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.reshape(1, 1).expand(shape) if tensor.numel() == 1 else tensor.reshape(shape)).contiguous()

    check_scale(tensors["weight_scale"], "weight_scale")
    made = {"qweight": tensors["weight"], "scale": whole(tensors["weight_scale"])}
    zero = tensors.get("weight_zero_point")
    if zero is not None and bool(zero.any()):
        if int(zero.min()) < -128 or int(zero.max()) > 127:
            raise ValueError(f"weight_zero_point holds {int(zero.min())} to {int(zero.max())}, and 8 bits hold -128 to "
                             "127")
        made["zero_point"] = whole(zero.to(torch.int8))
    return CanonicalWeight(made)


def _unpack(packed: Tensor, order: tuple[int, ...], *, signed: bool) -> Tensor:
    """int32 [R, C] -> int8 [R, 8 C] of -8 to 7; unsigned nibbles less 8."""
    shifts = torch.tensor([4 * order.index(column) for column in range(8)], dtype=torch.int32, device=packed.device)
    codes = ((packed[..., None] >> shifts) & 15).flatten(-2).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes) if signed else codes - 8


def _dtypes(config: Any) -> tuple[str, ...]:
    """Of the weight: one, or those of its stages."""
    weight = config.get("weight") if isinstance(config, Mapping) else None
    stages = weight if isinstance(weight, list) else [weight]
    return tuple(str(stage.get("dtype")) for stage in stages if isinstance(stage, Mapping))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


register_format(Format(
    name="quark", title="Quark", methods=("quark",), reader=QuarkReader,
    reads="FP8, MXFP4, MXFP6, NVFP4, INT8, INT4 and UINT4 by group, INT4-FP8", runs="int4 and int8 native, floats as "
    "stored"))
