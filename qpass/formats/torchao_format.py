"""torchao: checkpoints whose weights are torchao's tensor subclasses, described in the metadata of their safetensors.

Source: torchao 0.18, prototype/safetensors. metadata["a.b.weight"] is JSON, {"_type", "_data", "_tensor_data_names"};
the tensors of it are `a.b._weight_<name>`. No class is made of what the file says: the types are those written here.
    Int8Tensor, IntxUnpackedToInt8Tensor   int, w = (qdata - zero_point) * scale
    Float8Tensor                           fp8
    NVFP4Tensor, MXTensor                  nvfp4_mul, mxfp8, mxfp4; scales unswizzled from tiles of 128 x 4
    Int4Tensor                             affine_signed, w = qdata * scale + zero_point, both [K / G, N]
    Int4PlainInt32Tensor                   int4, w = (qdata - zero_point) * scale, both [K / G, N]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from qpass.codecs.affine import pack_unsigned
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.codec_reads import FP8_TOKEN, check_scale, codec_read, fp8_args, spec_of
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_Read: TypeAlias = "Callable[[dict[str, Tensor], LinearSpec], CanonicalWeight]"
_NEEDS = {"Int8Tensor": ("qdata", "scale"), "IntxUnpackedToInt8Tensor": ("qdata", "scale", "zero_point"),
          "Float8Tensor": ("qdata", "scale"), "NVFP4Tensor": ("qdata", "scale"), "MXTensor": ("qdata", "scale"),
          "Int4Tensor": ("qdata", "scale", "zero_point"), "Int4PlainInt32Tensor": ("qdata", "scale", "zero_point"),
          "Int4TilePackedTo4dTensor": ("qdata", "scale_and_zero")}


class TorchAoReader(Reader):
    """Types from the file's metadata, layer by layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.described = {name: text for name, text in checkpoint.source.metadata.items()
                          if (isinstance(text, str) and name.endswith((".weight", ".bias"))) or "." in name}

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        said = self._said(place.name)
        kind = said.get("_type", "Tensor")
        if kind == "Tensor":
            return None
        where = f"{self.checkpoint.path}: {place.name}"
        if kind not in _NEEDS or len(place.shape) != 2:
            raise CheckpointError(f"{where} is a {kind}, which this version does not know; "
                                  f"{', '.join(_NEEDS)} are read")
        owner, _, leaf = place.name.rpartition(".")
        prefix = f"{owner}._{leaf}_"
        names = {n.removeprefix(prefix): n for n in self.checkpoint.tensors if n.startswith(prefix)}
        for short in _NEEDS[kind]:
            self.checkpoint.need(prefix + short, of=place.path)
        data = said.get("_data")
        try:
            found = _READS[kind](self.checkpoint, place, names, data if isinstance(data, Mapping) else {})
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{where}: the description of its {kind} makes no sense: {error!r}") from error
        return found

    def leftover(self, name: str) -> str | None:
        return "a static activation scale" if name.endswith(("_act_quant_scale", "_act_per_tensor_scale")) else None

    def shape_of(self, path: str) -> tuple[int, int] | None:
        said, codes = self._said(f"{path}.weight"), self.checkpoint.tensors.get(f"{path}._weight_qdata")
        if codes is None or len(codes.shape) != 2:
            return None
        packed = 2 if codes.dtype == "uint8" or said.get("_type") == "Int4Tensor" else 1
        return codes.shape[0], codes.shape[1] * packed

    def _said(self, name: str) -> Mapping[str, Any]:
        try:
            found = json.loads(self.described.get(name, "{}"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.checkpoint.path}: the metadata of {name} is not JSON: {error}") from error
        return found if isinstance(found, dict) else {}


def _pre_scale(names: Mapping[str, str]) -> dict[str, str]:
    return {"pre_scale": names["act_pre_scale"]} if "act_pre_scale" in names else {}


def _integers(checkpoint: Checkpoint, place: Place, names: Mapping[str, str], data: Mapping[str, Any]) -> WeightRead:
    n, k = place.shape
    dtype = (data.get("target_dtype") or {}).get("_data", "int8")
    bits = int(str(dtype).removeprefix("int"))
    size = int(data["block_size"][1])
    if not 0 < size <= max(k, 1) or k % size:
        raise ValueError(f"block_size {data['block_size']} of {[n, k]}")
    args = WeightArgs(bits=bits, granularity="per_channel" if size == k else "per_group",
                      group_size=None if size == k else size)  # asymmetric where a zero point is not zero
    checkpoint.need(names["qdata"], of=place.path, dtype="int8", shape=(n, k))
    return WeightRead(spec=spec_of(args, place.shape, _activation(data)), read=_read_integers, tensors={
        **{short: names[short] for short in ("qdata", "scale", "zero_point") if short in names},
        **_pre_scale(names)})


def _activation(data: Mapping[str, Any]) -> ActivationArgs | None:
    said = data.get("activation_quantization")
    if said is not None:
        return ActivationArgs(symmetric="asym" not in str(said))
    kwargs = data.get("act_quant_kwargs")
    if not isinstance(kwargs, Mapping):
        return None
    mapping = ((kwargs.get("_data") or {}).get("mapping_type") or {}).get("_data", "SYMMETRIC")
    return ActivationArgs(symmetric=mapping != "ASYMMETRIC")


def _read_integers(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    half, shape = 1 << spec.weight.bits - 1, (spec.out_features, spec.groups)
    made = {"qweight": tensors["qdata"], "scale": _spread(tensors["scale"], shape)}
    check_scale(made["scale"], "scale")
    if "zero_point" in tensors and bool(tensors["zero_point"].any()):
        made["zero_point"] = _spread(tensors["zero_point"], shape).to(torch.int8)
    for name in ("qweight", "zero_point"):
        if (q := made.get(name)) is not None and (int(q.min()) < -half or int(q.max()) >= half):
            raise ValueError(f"{name} holds {int(q.min())} to {int(q.max())}, and {spec.weight.bits} bits do not")
    if "pre_scale" in tensors:
        made["pre_scale"] = tensors["pre_scale"].reshape(-1)
    return CanonicalWeight(made)


def _spread(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    return (tensor.reshape(1, 1).expand(shape) if tensor.numel() == 1 else tensor.reshape(shape)).contiguous()


def _float8(checkpoint: Checkpoint, place: Place, names: Mapping[str, str], data: Mapping[str, Any]) -> WeightRead:
    args = fp8_args(place.shape, checkpoint.tensors[names["scale"]].shape, None)
    activation = FP8_TOKEN if data.get("act_quant_kwargs") else None
    return codec_read(checkpoint, place.path, args, place.shape,
                      {"weight": names["qdata"], "scale": names["scale"]}, activation)


def _four_bit_floats(checkpoint: Checkpoint, place: Place, names: Mapping[str, str], data: Mapping[str, Any]
                     ) -> WeightRead:
    """NVFP4Tensor and MXTensor; a missing per_tensor_scale is 1."""
    n, k = place.shape
    if "per_tensor_scale" in names or "elem_dtype" not in data:
        kind, bits, size = "nvfp4_mul", 4, 16
    else:
        element = data["elem_dtype"].get("_data") if isinstance(data["elem_dtype"], Mapping) else data["elem_dtype"]
        kinds = {"float8_e4m3fn": ("mxfp8", 8), "float8_e5m2": ("mxfp8", 8), "float4_e2m1fn_x2": ("mxfp4", 4)}
        (kind, bits), size = kinds[str(element)], 32
    args = WeightArgs(bits=bits, type=kind, granularity="per_group", group_size=size)
    if int(data.get("block_size", size)) != size:
        raise ValueError(f"block_size {data.get('block_size')} of a {kind}")
    codes = "weight" if kind == "mxfp8" else "packed"
    checkpoint.need(names["qdata"], of=place.path, shape=(n, k * bits // 8))
    rows, columns = (-(-n // 128) * 128, -(-(k // size) // 4) * 4) if data.get("is_swizzled_scales") else (n, k // size)
    stored = checkpoint.tensors[names["scale"]]
    if stored.nbytes != rows * columns:
        raise ValueError(f"scale {stored} of {[n, k]}")

    def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
        scale = tensors["scale"].view(torch.uint8)
        if data.get("is_swizzled_scales"):
            tiles = scale.reshape(rows // 128, columns // 4, 32, 4, 4).transpose(2, 3)
            scale = tiles.reshape(rows // 128, columns // 4, 128, 4).permute(0, 2, 1, 3).reshape(rows, columns)
            scale = scale[:n, :k // size]
        scale = scale.reshape(n, k // size).contiguous()
        made = {codes: tensors["qdata"] if codes == "weight" else tensors["qdata"].view(torch.uint8), "scale": scale}
        if kind == "nvfp4_mul":
            made["scale"] = scale.view(torch.float8_e4m3fn)
            check_scale(made["scale"], "scale")
            one = torch.ones(1, device=scale.device)
            made["scale_2"] = tensors["per_tensor_scale"].float().reshape(1) if "per_tensor_scale" in tensors else one
        return CanonicalWeight(made)

    activation = None
    if data.get("act_quant_kwargs"):
        activation = ActivationArgs(bits=bits, type="float", granularity="per_group", group_size=size,
                                    dynamic="local" if kind == "nvfp4_mul" else True)
    return WeightRead(spec=spec_of(args, place.shape, activation), read=read, tensors={
        short: names[short] for short in ("qdata", "scale", "per_tensor_scale") if short in names})


def _int4(checkpoint: Checkpoint, place: Place, names: Mapping[str, str], data: Mapping[str, Any]) -> WeightRead:
    n, k = place.shape
    size = int(data["block_size"][-1])
    words = checkpoint.tensors[names["qdata"]].dtype == "int32"
    if size < 1 or k % size:
        raise ValueError(f"block_size {data['block_size']} of {[n, k]}")
    checkpoint.need(names["qdata"], of=place.path, shape=(n, k // 8 if words else k // 2))
    for short in ("scale", "zero_point"):
        checkpoint.need(names[short], of=place.path, shape=(k // size, n))
    args = WeightArgs(bits=4, type="int" if words else "affine_signed", granularity="per_group", group_size=size,
                      symmetric=False)

    def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
        raw = tensors["qdata"].contiguous().view(torch.uint8)
        codes = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(-2)  # the even element in the low nibble
        scale = tensors["scale"].t().contiguous()
        check_scale(scale, "scale")
        zero = tensors["zero_point"].t().contiguous()
        made = {"qweight": codes.to(torch.int8) - 8, "scale": scale, "zero_point": zero.to(torch.int8) - 8}
        if not words:
            check_scale(zero, "zero_point")
            made = {"packed": pack_unsigned(codes ^ 8, 4), "scale": scale, "offset": zero}
        if "pre_scale" in tensors:
            made["pre_scale"] = tensors["pre_scale"].reshape(-1)
        return CanonicalWeight(made)

    return WeightRead(spec=spec_of(args, place.shape), read=read, tensors={
        **{short: names[short] for short in ("qdata", "scale", "zero_point")}, **_pre_scale(names)})


def _tiles(checkpoint: Checkpoint, place: Place, names: Mapping[str, str], data: Mapping[str, Any]) -> WeightRead:
    """int4 in the order of a tensor core's lanes, rows padded to a multiple of 8 and columns to one of 1024.

    Source: PyTorch, aten/src/ATen/native/cuda/int4mm.cu, matrix_to_m16n8k16_Bint4_layout on NVIDIA (AMD has another
    order in the same shape). Word [r, c, lane, j] has row 8 r + lane // 4; its nibble 4 odd + i, from the low end, has
    column 128 c + 32 j + 8 i + 2 (lane % 4) + odd. w = (q - 8) * scale + zero, in groups of block_size[-1].
    """
    n, k = place.shape
    size = int(data["block_size"][-1])
    rows, columns = -(-n // 8) * 8, -(-k // 1024) * 1024
    if size < 1 or k % size:
        raise ValueError(f"block_size {data['block_size']} of {[n, k]}")
    checkpoint.need(names["qdata"], of=place.path, dtype="int32", shape=(rows // 8, columns // 128, 32, 4))
    checkpoint.need(names["scale_and_zero"], of=place.path, shape=(columns // size, rows, 2))
    args = WeightArgs(bits=4, type="affine_signed", granularity="per_group", group_size=size, symmetric=False)

    def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
        words = tensors["qdata"].unflatten(2, (8, 4)).unsqueeze(-1)  # r, c, row, lane % 4, j, 1
        nibbles = (words >> torch.arange(0, 32, 4, device=words.device) & 15).to(torch.uint8).unflatten(-1, (2, 4))
        codes = nibbles.permute(0, 2, 1, 4, 6, 3, 5).reshape(rows, columns)[:n, :k]
        check_scale(tensors["scale_and_zero"], "scale_and_zero")
        scale, zero = (part[:k // size, :n].t().contiguous() for part in tensors["scale_and_zero"].unbind(-1))
        made = {"packed": pack_unsigned(codes, 4), "scale": scale, "offset": zero}
        if "pre_scale" in tensors:
            made["pre_scale"] = tensors["pre_scale"].reshape(-1)
        return CanonicalWeight(made)

    return WeightRead(spec=spec_of(args, place.shape), read=read, tensors={
        **{short: names[short] for short in ("qdata", "scale_and_zero")}, **_pre_scale(names)})


_READS: dict[str, Callable[[Checkpoint, Place, Mapping[str, str], Mapping[str, Any]], WeightRead]] = {
    "Int8Tensor": _integers, "IntxUnpackedToInt8Tensor": _integers, "Float8Tensor": _float8,
    "NVFP4Tensor": _four_bit_floats, "MXTensor": _four_bit_floats, "Int4Tensor": _int4, "Int4PlainInt32Tensor": _int4,
    "Int4TilePackedTo4dTensor": _tiles}

register_format(Format(
    name="torchao", title="torchao", methods=("torchao",), reader=TorchAoReader,
    reads=", ".join(_NEEDS), runs="integers native, floats as stored"))
