"""AutoRound, Intel Neural Compressor: one config over GPTQ's, AWQ's or LLM Compressor's tensors; bits layer by layer.

Source: auto-round 0.16, `export/export_to_autoround`. `packing_format` says whose layout the tensors have;
`extra_config` says, by layer name or regex, what differs from the rest (16 bits: not quantized).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qpass.errors import CheckpointError
from qpass.formats.awq import awq_weight
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.format_registry import Format, register_format
from qpass.formats.gptq import Settings, gptq_weight
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead

_KEYS = ("bits", "group_size", "sym", "data_type")


class AutoRoundReader(Reader):
    """A layer is quantized if it has a qweight."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.quantization
        extra = config.get("extra_config") or {}
        if not isinstance(extra, Mapping) or not all(isinstance(said, Mapping) for said in extra.values()):
            raise CheckpointError(f"{checkpoint.path}: extra_config does not map layers to their settings")
        self._extra = extra
        self._packing = str(config.get("packing_format") or "auto_round:auto_gptq")
        if str(config.get("data_type") or "int") != "int":
            raise CheckpointError(f"{checkpoint.path}: AutoRound data_type {config.get('data_type')!r} with packing "
                                  f"{self._packing!r} is not read by this version; it reads integers")

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        if f"{place.path}.qweight" not in self.checkpoint.tensors:
            return None
        said = self._settings(place.path)
        if self._is_awq(place.path):
            return awq_weight(self.checkpoint, place, bits=said["bits"], group_size=said["group_size"],
                              symmetric=bool(said["sym"]))
        version = 1 if self._packing.endswith("auto_gptq") else None
        return gptq_weight(self.checkpoint, place, Settings(bits=said["bits"], group_size=said["group_size"],
                                                            sym=said["sym"], version=version))

    def shape_of(self, path: str) -> tuple[int, int] | None:
        stored, bits = self.checkpoint.tensors.get(f"{path}.qweight"), self._settings(path)["bits"]
        if stored is None or len(stored.shape) != 2 or not isinstance(bits, int) or bits < 1:
            return None
        first, second = stored.shape
        return (second * 8, first) if self._is_awq(path) else (second, first * 32 // bits)

    def _is_awq(self, path: str) -> bool:
        return "awq" in self._packing

    def _settings(self, path: str) -> dict[str, Any]:
        config = self.checkpoint.quantization
        found = {"bits": config.get("bits", 4), "group_size": config.get("group_size", 128),
                 "sym": config.get("sym", True)}
        changes = self._extra.get(path)
        if changes is None:
            changes = next((said for name, said in self._extra.items() if _matches(name, path)), {})
        return {**found, **{key: value for key, value in changes.items() if key in _KEYS}}


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False


register_format(Format(
    name="auto-round", title="AutoRound, Intel Neural Compressor", methods=("auto-round", "intel/auto-round", "inc"),
    reader=AutoRoundReader, reads="GPTQ and AWQ packing, 2, 3, 4 and 8 bits, symmetric and asymmetric, extra_config",
    runs="native"))
