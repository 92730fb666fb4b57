"""HQQ: `W_q`, `scale`, `zero` and their settings, as HQQLinear.state_dict() gives them, in safetensors or qmodel.pt.

Source: hqq 0.2.8, core/quantize.py and core/bitpack.py. The weight is seen as rows of one group each (axis 1) or as
columns of one group each (axis 0); codes are packed along dim 0, the first part in the high bits:
8 bits as they are, 4 and 2 and 1 bits in uint8, 3 bits ten to an int32 from bit 27 down. w = (q - zero) * scale.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpass.codecs.affine import pack_unsigned
from qpass.dtype import dtype_name, is_float
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Source, Stored, check_inside
from qpass.formats.codec_reads import check_scale, spec_of
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.formats.safetensors_file import weights_file
from qpass.formats.safetensors_folder import SafetensorsFolder
from qpass.scheme import WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_SETTINGS = frozenset({
    "axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits", "offload_meta", "optimize",
    "packing", "quant_scale", "quant_zero", "round_zero", "shape", "stores_quant_config", "unpack_view_dtype",
    "view_as_float"})


class HqqReader(Reader):
    """What is quantized is what has a `W_q`; bits, groups and axis are told by the shapes."""

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        tensors, path = self.checkpoint.tensors, place.path
        codes = tensors.get(f"{path}.W_q")
        if codes is None or len(place.shape) != 2:
            return None
        names = {name: f"{path}.{name}" for name in ("W_q", "scale", "zero")}
        if f"{path}.scale" not in tensors and f"{path}.scale_q" in tensors:
            raise CheckpointError(f"{self.checkpoint.path}: {path} has quantized scales (quant_scale), which this "
                                  "version does not read; save it without")
        scale = tensors[self.checkpoint.need(names["scale"], of=path)]
        self.checkpoint.need(names["zero"], of=path, shape=scale.shape)
        args = self._args(place, codes, scale)
        if "shape" in (setting := f"{path}.shape").split(".") and setting in tensors:
            names["shape"] = self.checkpoint.need(setting, of=path, shape=(2,))
        return WeightRead(spec=spec_of(args, place.shape), tensors=names, read=_read)

    def _args(self, place: Place, codes: Stored, scale: Stored) -> WeightArgs:
        n, k = place.shape
        groups = max(scale.shape[0] * scale.shape[1], 1) if len(scale.shape) == 2 else 0
        wrong = CheckpointError(f"{place.path}.W_q in {codes.file} is {codes} with scales {scale}, which do not make "
                                f"up {[n, k]}")
        if not groups or not n * k or n * k % groups or len(codes.shape) != 2 or not is_float(scale.dtype):
            raise wrong
        size, axis = n * k // groups, 1 if scale.shape[1] == 1 and scale.shape[0] != 1 else 0
        rows, columns = (groups, size) if axis == 1 else (size, groups)
        if axis == 1 and k % size:
            raise CheckpointError(f"{self.checkpoint.path}: {place.path} has groups of {size} that run across rows of "
                                  f"{k}; groups within rows, and axis 0, are read")
        if codes.dtype == "int32" and codes.shape == (-(-rows // 10), columns):
            bits = 3
        else:
            bits = next((b for b in (8, 4, 2, 1) if codes.dtype == "uint8"
                         and codes.shape == (-(-rows * b // 8), columns)), 0)
        if not bits:
            raise wrong
        return WeightArgs(bits=bits, type="affine_zero" if axis == 1 else "hqq_columns", granularity="per_group",
                          group_size=size, symmetric=False)

    def shape_of(self, path: str) -> tuple[int, int] | None:
        name = f"{path}.shape"  # two numbers; the codes lie in groups, and do not tell
        stored = self.checkpoint.tensors.get(name)
        if stored is None or stored.shape != (2,) or f"{path}.W_q" not in self.checkpoint.tensors:
            return None
        if stored.dtype not in ("int64", "int32"):
            raise CheckpointError(f"{name} in {stored.file} is {stored}; a shape is two integers")
        n, k = struct.unpack("<2q" if stored.dtype == "int64" else "<2i", self.checkpoint.raw(name))
        return (n, k) if n > 0 and k > 0 else None

    def leftover(self, name: str) -> str | None:
        return "a setting, told by the shapes" if name.rpartition(".")[2] in _SETTINGS else None


def _read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    if "shape" in tensors and tensors["shape"].tolist() != list(spec.shape):
        raise ValueError(f"shape says {tensors['shape'].tolist()}, the layer is {list(spec.shape)}")
    for name in ("scale", "zero"):
        check_scale(tensors[name], name)
    bits, raw, (n, k) = spec.weight.bits, tensors["W_q"], spec.shape
    if bits == 3:
        parts = [raw >> 27 - 3 * part & 7 for part in range(10)]
    else:
        parts = [raw >> 8 - bits * (part + 1) & (1 << bits) - 1 for part in range(8 // bits)]
    rows = n * k // raw.shape[1]
    q = torch.cat(parts)[:rows].to(torch.uint8).reshape(n, k)
    columns = spec.weight.type == "hqq_columns"
    shape = (-1,) if columns else (n, spec.groups)
    return CanonicalWeight({"packed": pack_unsigned(q, bits), "scale": tensors["scale"].reshape(shape),
                            "zero": tensors["zero"].reshape(shape)})

class HqqPickle:
    """The tensors of qmodel.pt, {module: {name: tensor or setting}}, as `module.name`; settings are told by shapes."""

    def __init__(self, file: Path) -> None:
        check_inside(file)
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever unpickling finds
            raise CheckpointError(f"{file} cannot be read with torch.load(weights_only=True): "
                                  f"{str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
        if not isinstance(held, dict) or not all(isinstance(part, dict) for part in held.values()):
            raise CheckpointError(f"{file} does not hold the state of each module, as HQQ writes it")
        self._held: dict[str, Tensor] = {}
        for path, part in held.items():
            for name, value in part.items():
                if name == "shape" and isinstance(value, list | tuple) and all(isinstance(n, int) for n in value):
                    value = torch.tensor(value)
                if isinstance(value, torch.Tensor):
                    self._held[f"{path}.{name}"] = value.detach()
        self.metadata: Mapping[str, Any] = {}
        self.tensors: Mapping[str, Stored] = {
            name: Stored(file=file, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in self._held.items()}

    def read(self, names: Iterable[str], at: int | None = None) -> dict[str, Tensor]:
        return {name: (self._held[name] if at is None else self._held[name][at]).clone() for name in names}


def _source(path: Path, allow_pickle: bool) -> Source:
    if weights_file(path) is not None:
        return SafetensorsFolder(path)
    if not allow_pickle:
        raise CheckpointError(f"{path / 'qmodel.pt'} is a pickle, which may do more than hold numbers; if you trust "
                              "whoever made it: qpass.load(folder, allow_pickle=True)")
    return HqqPickle(path / "qmodel.pt")


def _claims(path: Path, config: Mapping[str, Any]) -> bool:
    return path.is_dir() and (path / "qmodel.pt").is_file()


register_format(Format(
    name="hqq", title="HQQ", methods=("hqq",), reader=HqqReader, claims=_claims, source=_source,
    reads="8, 4, 3, 2 and 1 bits, either axis, in safetensors, or with allow_pickle in qmodel.pt", runs="as stored"))
