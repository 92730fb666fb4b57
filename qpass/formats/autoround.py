"""AutoRound, Intel Neural Compressor: one config over GPTQ's, AWQ's or LLM Compressor's tensors; bits layer by layer.

Source: auto-round 0.16, `export/export_to_autoround`. `packing_format` says whose layout the tensors have;
`extra_config` says, by layer name or regex, what differs from the rest (16 bits: not quantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpass.errors import CheckpointError
from qpass.formats.awq import awq_weight
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.codec_reads import FP4_LOCAL, FP8_STATIC
from qpass.formats.float_layer import float_layer, layer_shape
from qpass.formats.format_registry import Format, register_format
from qpass.formats.gptq import Settings, gptq_weight
from qpass.formats.patterns import pattern_of
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
        self._packing = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")
        # Whether activations are rounded too: by one scale (fp8), or group by group below one of the layer (nv_fp4).
        static = config.get("act_dynamic") is False and config.get("act_bits") == 8
        self._activation = FP8_STATIC if static else FP4_LOCAL if config.get("act_bits") == 4 else None

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        tensors, path = self.checkpoint.tensors, place.path
        if f"{path}.qweight" not in tensors:
            if f"{path}.weight_scale" not in tensors or len(place.shape) != 2:
                return None
            activation = self._activation
            if activation == FP8_STATIC and f"{path}.input_scale" not in tensors:
                activation = None
            return float_layer(self.checkpoint, path, place.shape, divisor="weight_global_scale", reciprocal=True,
                               weight="weight_packed" if f"{path}.weight_packed" in tensors else "weight",
                               activation=activation)
        said = self._settings(place.path)
        if self._is_awq(place.path):
            return awq_weight(self.checkpoint, place, bits=said["bits"], group_size=said["group_size"],
                              symmetric=bool(said["sym"]))
        # Only its "gptq" packing stores zero points less one; symmetric weights of either kind were given both names.
        less = "gptq" in self._packing and "gptqmodel" not in self._packing
        version = 1 if self._packing.endswith("auto_gptq") else None if said["sym"] else 1 if less else 2
        return gptq_weight(self.checkpoint, place, Settings(bits=said["bits"], group_size=said["group_size"],
                                                            sym=said["sym"], version=version))

    def leftover(self, name: str) -> str | None:
        unused = name.endswith((".input_global_scale", ".input_scale"))
        return "a static activation scale, which this machine does not need" if unused else None

    def shape_of(self, path: str) -> tuple[int, int] | None:
        stored, bits = self.checkpoint.tensors.get(f"{path}.qweight"), self._settings(path)["bits"]
        if stored is None:
            return layer_shape(self.checkpoint, path)
        if len(stored.shape) != 2 or not isinstance(bits, int) or bits < 1:
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
            changes = next((said for name, said in self._extra.items() if pattern_of(name).fullmatch(path)), {})
        return {**found, **{key: value for key, value in changes.items() if key in _KEYS}}


register_format(Format(
    name="auto-round", title="AutoRound, Intel Neural Compressor", methods=("auto-round", "intel/auto-round", "inc"),
    reader=AutoRoundReader, reads="GPTQ and AWQ packing, 2, 3, 4 and 8 bits, symmetric and asymmetric, extra_config; "
                                  "MXFP4, NVFP4, FP8",
    runs="integers native, floats as stored"))
