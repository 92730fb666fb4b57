"""AWQ: 4-bit integers packed along the outputs (GEMM) or the inputs (GEMV), as AutoAWQ and GPTQModel write them.

Source: AutoAWQ 0.2.9, `utils/packing_utils.py` and `modules/linear/gemm.py`, `gemv.py`; the layouts are
gemm  qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]; nibble i is column [0,2,4,6,1,3,5,7][i]
gemv  qweight int32 [N, K / 8], qzeros int32 [N, >= G / 8], scales [N, >= G], columns in order, the ends padding
and w = (q - zero) * scale. What AWQ did to activations is folded into the layers before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpass.dtype import FLOATS
from qpass.errors import CheckpointError
from qpass.formats.bits import unpack_rows
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.format_registry import Format, register_format
from qpass.formats.integer_weights import as_canonical, checked_scale, integer_spec
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word holds each of its eight columns."""


def awq_weight(checkpoint: Checkpoint, place: Place, *, bits: Any, group_size: Any, symmetric: bool,
               gemv: bool = False) -> WeightRead:
    """How to read the AWQ tensors of a place. Raises CheckpointError where headers and config disagree."""
    path, where = place.path, f"{checkpoint.path}: {place.path}"
    if bits != 4:
        raise CheckpointError(f"{where}: AWQ of {bits!r} bits; 4 are read")
    if len(place.shape) != 2:
        raise CheckpointError(f"{where} holds an AWQ weight, and the model has {list(place.shape)} there, no matrix")
    spec = integer_spec(4, group_size, symmetric, place.shape, where)
    n, k, groups, of = spec.out_features, spec.in_features, spec.groups, f"{path} (4 bits, AWQ)"
    if (k if gemv else n) % 8:
        raise CheckpointError(f"{where}: [{n}, {k}] does not fill int32 words, as AWQ needs")
    need = checkpoint.need
    tensors = {"qweight": need(f"{path}.qweight", of=of, dtype="int32",
                               shape=(n, k // 8) if gemv else (k, n // 8)),
               "scales": need(f"{path}.scales", of=of, dtype=FLOATS, shape=None if gemv else (groups, n))}
    if f"{path}.qzeros" in checkpoint.tensors or not symmetric:
        tensors["qzeros"] = need(f"{path}.qzeros", of=of, dtype="int32", shape=None if gemv else (groups, n // 8))
    return WeightRead(spec=spec, tensors=tensors, read=read_gemv if gemv else read_gemm)


def read_gemm(tensors: Mapping[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    """The canonical weight of the GEMM order. Raises ValueError, saying which tensor is wrong and how."""
    zeros = _columns(tensors["qzeros"], spec.out_features).t().contiguous() if "qzeros" in tensors else None
    return CanonicalWeight(as_canonical(_columns(tensors["qweight"], spec.out_features).t().contiguous(),
                                        checked_scale(tensors["scales"]).t().contiguous(), zeros))


def read_gemv(tensors: Mapping[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    """The same of the GEMV order."""
    n, groups, scales = spec.out_features, spec.groups, tensors["scales"]
    if scales.dim() != 2 or scales.shape[0] != n or scales.shape[1] < groups:
        raise ValueError(f"scales are {tuple(scales.shape)}, expected {n} rows of {groups} or more")
    zeros = None
    if "qzeros" in tensors:
        packed = tensors["qzeros"]
        if packed.dim() != 2 or packed.shape[0] != n or packed.shape[1] * 8 < groups:
            raise ValueError(f"qzeros are {tuple(packed.shape)}, expected {n} rows of {-(-groups // 8)} words or more")
        zeros = unpack_rows(packed, 4, packed.shape[1] * 8)[:, :groups].contiguous()
    return CanonicalWeight(as_canonical(unpack_rows(tensors["qweight"], 4, spec.in_features),
                                        checked_scale(scales[:, :groups]).contiguous(), zeros))


def _columns(packed: Tensor, n: int) -> Tensor:
    """int32 [R, N / 8], interleaved, to int8 [R, N] centred on 0."""
    words: Tensor = unpack_rows(packed, 4, n).unflatten(1, (-1, 8))
    return words[:, :, list(NIBBLE_OF)].flatten(1)


class AwqReader(Reader):
    """A layer is quantized if it has a qweight."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        said = {**checkpoint.side("quant_config.json"), **checkpoint.quantization}
        version = str(said.get("version") or said.get("format") or "gemm").lower()
        if version not in ("gemm", "gemv"):
            raise CheckpointError(f"{checkpoint.path}: AWQ version {version!r} is packed for one kernel; 'gemm' and "
                                  "'gemv' are read")
        self._gemv = version == "gemv"
        self._bits = said.get("bits", said.get("w_bit", 4))
        self._group = said.get("group_size", said.get("q_group_size", 128))
        self._symmetric = not said.get("zero_point", not said.get("sym", False))

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        if f"{place.path}.qweight" not in self.checkpoint.tensors:
            return None
        return awq_weight(self.checkpoint, place, bits=self._bits, group_size=self._group, symmetric=self._symmetric,
                          gemv=self._gemv)

    def shape_of(self, path: str) -> tuple[int, int] | None:
        stored = self.checkpoint.tensors.get(f"{path}.qweight")
        if stored is None or len(stored.shape) != 2:
            return None
        return (stored.shape[0], stored.shape[1] * 8) if self._gemv else (stored.shape[1] * 8, stored.shape[0])


def _claims(path: Path, config: Mapping[str, Any]) -> bool:
    return path.is_dir() and (path / "quant_config.json").is_file() and not config.get("quantization_config")


register_format(Format(
    name="awq", title="AWQ", methods=("awq",), reader=AwqReader, claims=_claims,
    reads="GEMM and GEMV order, 4 bits, asymmetric and symmetric", runs="native"))
