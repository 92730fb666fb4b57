"""quanto: optimum-quanto's int8, float8, int4 and int2 weights.

Source: optimum-quanto 0.2.7, tensor/weights. `weight._data` [N, K] with `weight._scale` [N, 1] is int8 or float8;
`weight._data._data` is [rows / 2 or / 4, G] bytes of a weight seen as rows of one group each, the first rows in the low
bits, with `weight._scale` and `weight._shift` [rows, 1]: w = q * scale - shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpass.codecs.affine import pack_unsigned
from qpass.dtype import FLOAT8, is_float, itemsize
from qpass.errors import CheckpointError
from qpass.formats.codec_reads import check_scale, codec_read, fp8_args, spec_of
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor


class QuantoReader(Reader):
    """What is quantized is what has `weight._scale`."""

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        tensors, prefix = self.checkpoint.tensors, f"{place.path}.weight"
        scale = tensors.get(f"{prefix}._scale")
        if scale is None or len(place.shape) != 2:
            return None
        if f"{prefix}._data._data" in tensors:
            return self._grouped(place, scale.shape)
        names = {"weight": f"{prefix}._data", "scale": f"{prefix}._scale"}
        codes = tensors[self.checkpoint.need(names["weight"], of=place.path, shape=place.shape)]
        if codes.dtype in FLOAT8:
            return codec_read(self.checkpoint, place.path, fp8_args(place.shape, scale.shape, None), place.shape, names)
        self.checkpoint.need(names["weight"], of=place.path, dtype="int8")
        if scale.nbytes // itemsize(scale.dtype) not in (1, place.shape[0]):
            raise CheckpointError(f"{names['scale']} in {scale.file} is {scale}, for {list(place.shape)}")
        return WeightRead(spec=spec_of(WeightArgs(bits=8), place.shape), tensors=names, read=_read_int8)

    def _grouped(self, place: Place, scale: tuple[int, ...]) -> WeightRead:
        prefix, (n, k) = f"{place.path}.weight", place.shape
        names = {"codes": f"{prefix}._data._data", "scale": f"{prefix}._scale", "shift": f"{prefix}._shift"}
        codes = self.checkpoint.tensors[self.checkpoint.need(names["codes"], of=place.path, dtype="uint8")]
        rows = scale[0] if len(scale) == 2 and scale[1] == 1 else 0
        per_byte = -(-rows // codes.shape[0]) if codes.shape and codes.shape[0] else 0
        if not rows or rows % n or k % (rows // n) or per_byte not in (2, 4) or (
                codes.shape != (-(-rows // per_byte), k * n // rows)):
            raise CheckpointError(f"{names['codes']} in {codes.file} is {list(codes.shape)} with scales {list(scale)}, "
                                  f"which do not make up {[n, k]}; groups along the inputs (axis 0) are read")
        self.checkpoint.need(names["shift"], of=place.path, shape=scale)
        args = WeightArgs(bits=8 // per_byte, type="affine", granularity="per_group", group_size=k * n // rows,
                          symmetric=False)
        if not is_float(self.checkpoint.tensors[names["shift"]].dtype):
            raise CheckpointError(f"{names['shift']} is an integer; shifts of quanto since 0.2.3 are floats")
        return WeightRead(spec=spec_of(args, place.shape), tensors=names, read=_read_grouped)

    def shape_of(self, path: str) -> tuple[int, int] | None:
        codes = self.checkpoint.tensors.get(f"{path}.weight._data")
        return (codes.shape[0], codes.shape[1]) if codes is not None and len(codes.shape) == 2 else None

    def leftover(self, name: str) -> str | None:
        if name.endswith((".input_scale", ".output_scale")):
            return "the scale of an activation, which is kept in the model's dtype"
        return None


def _read_int8(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    check_scale(tensors["scale"], "_scale")
    scale = tensors["scale"].reshape(-1, 1).expand(spec.out_features, 1).contiguous()
    return CanonicalWeight({"qweight": tensors["weight"], "scale": scale})


def _read_grouped(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    bits, shape = spec.weight.bits, (spec.out_features, spec.groups)
    check_scale(tensors["scale"], "_scale")
    check_scale(tensors["shift"], "_shift")
    parts = [tensors["codes"] >> bits * part & (1 << bits) - 1 for part in range(8 // bits)]
    q = torch.cat(parts)[:shape[0] * shape[1]].reshape(spec.shape)
    return CanonicalWeight({"packed": pack_unsigned(q, bits), "scale": tensors["scale"].reshape(shape),
                            "offset": -tensors["shift"].reshape(shape)})


def _claims(path: Path, config: Mapping[str, Any]) -> bool:
    return not config.get("quantization_config") and (path / "quanto_qmap.json").is_file()


register_format(Format(
    name="quanto", title="optimum-quanto", methods=("quanto",), reader=QuantoReader, claims=_claims,
    reads="qint8, qfloat8, qint4, qint2", runs="qint8 native, the others as stored"))
