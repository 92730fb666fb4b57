"""FP8: `quant_method` fp8, fbgemm_fp8 and mxfp8, float8 weights with scales by tensor, row, block or group of 32.

Sources: Transformers 5.23, integrations/finegrained_fp8.py and fbgemm_fp8.py. `weight_scale_inv` multiplies, whatever
its name says; a last block of a row or column may be smaller. FP4 experts in int8 bytes are read as mxfp4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.codec_reads import FP8_STATIC, FP8_TOKEN
from qpass.formats.float_layer import float_layer
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import ActivationArgs

_UNUSED = {"input_scale": "a static activation scale", "activation_scale": "a static activation scale",
           "input_scale_ub": "an upper bound of activation scales"}


class Fp8Reader(Reader):
    """What is quantized is what has a scale; the config only says the size of blocks."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.block = _block(checkpoint.quantization, str(checkpoint.path / "config.json"))

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        scale = next((name for name in ("weight_scale_inv", "weight_scale")
                      if f"{place.path}.{name}" in self.checkpoint.tensors), None)
        if scale is None:
            return None
        return float_layer(self.checkpoint, place.path, place.shape, scale=scale, block=self.block,
                           activation=self._activation(place.path))

    def _activation(self, path: str) -> ActivationArgs | None:
        if self.checkpoint.quantization.get("activation_scheme") == "static":
            return FP8_STATIC if f"{path}.input_scale" in self.checkpoint.tensors else None
        return FP8_TOKEN if self.block is None else replace(FP8_TOKEN, granularity="per_group",
                                                            group_size=self.block[1])

    def shape_of(self, path: str) -> tuple[int, int] | None:
        stored = self.checkpoint.tensors.get(f"{path}.weight")
        scaled = any(f"{path}.{name}" in self.checkpoint.tensors for name in ("weight_scale_inv", "weight_scale"))
        return (stored.shape[0], stored.shape[1]) if stored is not None and scaled and len(stored.shape) == 2 else None

    def leftover(self, name: str) -> str | None:
        return _UNUSED.get(name.rpartition(".")[2])


def _block(quantization: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(
            isinstance(size, int) and 0 < size <= 1 << 20 for size in block):
        raise CheckpointError(f"{where}: weight_block_size is {block!r}, and must be two positive sizes")
    return block[0], block[1]


register_format(Format(
    name="fp8", title="FP8 (block, row, tensor)", methods=("fp8", "fbgemm_fp8", "mxfp8"), reader=Fp8Reader,
    reads="float8 weights with scales by tensor, row, block or group of 32", runs="as stored"))
