"""GPTQ: integers packed along the inputs in int32 words, as AutoGPTQ and GPTQModel write them (versions 1 and 2).

Source: GPTQModel 7.7, `nn_modules/qlinear/torch.py` and `utils/model.py`; the layout is
qweight  int32 [K * bits / 32, N]   a dense stream along K, the low bits first
qzeros   int32 [G, N * bits / 32]   the same along N; version 1 stores zero - 1, subtracted from the whole word, so that
                                    a zero of 0 borrows from its neighbour (3 bits straddle words: from the field)
scales   float [G, N], g_idx int32 [K] the group of each input, which may be missing where groups run in order
and w[n, k] = scales[g, n] * (q[k, n] - zero[g, n]) with g = g_idx[k]. A group size that does not divide K leaves one
group smaller than the rest; such a weight runs through the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qpass.dtype import FLOATS
from qpass.errors import CheckpointError
from qpass.formats.bits import unpack_rows
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.format_registry import Format, register_format
from qpass.formats.integer_weights import as_canonical, checked_scale, group_order, integer_spec, uneven_columns
from qpass.formats.patterns import matches
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one layer: bits, group_size, sym as the config says them; `version` 1 or 2, None to tell by the zeros;
    `ordered` unless the config says that groups run in order (desc_act)."""

    bits: Any
    group_size: Any
    sym: Any
    version: int | None
    ordered: bool = True


def gptq_weight(checkpoint: Checkpoint, place: Place, settings: Settings) -> WeightRead:
    """How to read the GPTQ tensors of a place. Raises CheckpointError where headers and settings disagree."""
    path, where = place.path, f"{checkpoint.path}: {place.path}"
    if len(place.shape) != 2:
        raise CheckpointError(f"{where} holds a GPTQ weight, and the model has {list(place.shape)} there, no matrix")
    spec = integer_spec(settings.bits, settings.group_size, settings.sym, place.shape, where, uneven=True)
    n, k, bits, of = spec.out_features, spec.in_features, spec.weight.bits, f"{path} ({settings.bits} bits, GPTQ)"
    if k * bits % 32 or n * bits % 32:
        raise CheckpointError(f"{where}: [{n}, {k}] of {bits} bits does not fill int32 words, as GPTQ needs")
    need = checkpoint.need
    tensors = {"qweight": need(f"{path}.qweight", of=of, dtype="int32", shape=(k * bits // 32, n)),
               "qzeros": need(f"{path}.qzeros", of=of, dtype="int32", shape=(spec.groups, n * bits // 32)),
               "scales": need(f"{path}.scales", of=of, dtype=FLOATS, shape=(spec.groups, n))}
    if f"{path}.g_idx" in checkpoint.tensors:
        short = "g_idx" if settings.ordered else "g_idx_in_order"
        tensors[short] = need(f"{path}.g_idx", of=of, dtype=("int32", "int64"), shape=(k,))

    def read(found: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
        return read_gptq(found, spec, settings.version)

    return WeightRead(spec=spec, tensors=tensors, read=read)


def read_gptq(tensors: Mapping[str, Tensor], spec: LinearSpec, version: int | None) -> CanonicalWeight:
    """The canonical weight of GPTQ's tensors. Raises ValueError, saying which tensor is wrong and how."""
    bits, n, k = spec.weight.bits, spec.out_features, spec.in_features
    codes = unpack_rows(tensors["qweight"].t().contiguous(), bits, k)
    zeros = read_zeros(tensors["qzeros"], bits, n, version or 1)
    if version is None and spec.weight.symmetric and bool(zeros.any()):
        zeros = read_zeros(tensors["qzeros"], bits, n, 2)
    if spec.weight.symmetric and bool(zeros.any()) and bool((zeros == zeros.flatten()[0]).all()):
        raise ValueError(f"qzeros hold {int(zeros.flatten()[0]) + (1 << bits - 1)} everywhere, and a symmetric weight "
                         f"has {1 << bits - 1}; the file may be of another version of GPTQ than its config says")
    scale = checked_scale(tensors["scales"]).t().contiguous()
    g_idx = tensors.get("g_idx", tensors.get("g_idx_in_order"))
    if spec.weight.type == "int_columns":
        return CanonicalWeight(uneven_columns(codes, scale, zeros.t().contiguous(), g_idx, spec))
    order = group_order(g_idx, spec) if g_idx is not None else None
    return CanonicalWeight(as_canonical(codes, scale, zeros.t().contiguous(), order))


def read_zeros(qzeros: Tensor, bits: int, n: int, version: int) -> Tensor:
    """qzeros int32 [G, N * bits / 32] to zero points int8 [G, N] of codes that are centred on 0."""
    if version == 1 and bits in _ONES:
        ones = torch.tensor(_ONES[bits], dtype=torch.int64, device=qzeros.device)
        qzeros = (qzeros.long() + ones).to(torch.int32)  # wraps, as the subtraction did
    zeros = unpack_rows(qzeros.contiguous(), bits, n)
    if version == 1 and bits not in _ONES:
        half = 1 << bits - 1
        zeros = ((zeros.int() + half + 1) % (2 * half) - half).to(torch.int8)
    return zeros


class GptqReader(Reader):
    """A layer is quantized if it has a qweight; `dynamic` says what differs from the rest."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = {**checkpoint.side("quantize_config.json"), **checkpoint.quantization}
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        layout = "marlin" if config.get("is_marlin_format") else layout
        if layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{checkpoint.path}: GPTQ checkpoint_format {layout!r} is packed for one kernel; the "
                                  "formats read are 'gptq' and 'gptq_v2'. GPTQModel converts it back")
        if any(name.endswith(".workspace") and name.removesuffix("workspace") + "B" in checkpoint.tensors
               for name in checkpoint.tensors):
            raise CheckpointError(f"{checkpoint.path}: its tensors (B, s, workspace) are packed for the Marlin kernel; "
                                  "take the checkpoint that they were made from, or convert it back with GPTQModel")
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise CheckpointError(f"{checkpoint.path}: dynamic is {type(dynamic).__name__}, not layers' settings")
        self._config, self._dynamic, self._version = config, dynamic, 2 if layout == "gptq_v2" else 1

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        if f"{place.path}.qweight" not in self.checkpoint.tensors:
            return None
        return gptq_weight(self.checkpoint, place, self._settings(place.path))

    def shape_of(self, path: str) -> tuple[int, int] | None:
        stored = self.checkpoint.tensors.get(f"{path}.qweight")
        bits = self._settings(path).bits
        if stored is None or len(stored.shape) != 2 or not isinstance(bits, int) or bits < 1:
            return None
        return stored.shape[1], stored.shape[0] * 32 // bits

    def _settings(self, path: str) -> Settings:
        config: dict[str, Any] = {"bits": 4, "group_size": -1, "sym": True, **self._config}
        for pattern, changes in self._dynamic.items():
            try:
                if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), path):
                    config.update(changes or {})
                    break
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{self.checkpoint.path}: dynamic {pattern!r}: {error}") from error
        return Settings(bits=config["bits"], group_size=config["group_size"], sym=config["sym"], version=self._version,
                        ordered=config.get("desc_act") is not False)


def _claims(path: Any, config: Mapping[str, Any]) -> bool:
    return path.is_dir() and (path / "quantize_config.json").is_file() and not config.get("quantization_config")


register_format(Format(
    name="gptq", title="GPTQ, GPTQModel", methods=("gptq",), reader=GptqReader, claims=_claims,
    reads="versions 1 and 2, 2 to 8 bits, symmetric and asymmetric, desc_act, no g_idx, any group size, dynamic",
    runs="native; as stored where groups do not divide the inputs"))
