"""ModelOpt: NVIDIA's unified Hugging Face checkpoints, told layer by layer by their tensors.

Source: nvidia-modelopt 0.47, export/quant_utils.py. `hf_quant_config.json` or config.json names an algorithm; what a
layer has is what its tensors are, so mixed checkpoints need nothing more.
    float8 weight, weight_scale                    fp8; a 2-D block scale is [R, 1, C, 1]
    uint8 [N, K / 2], float8 scale, weight_scale_2 nvfp4, scales multiplied
    uint8 weight, uint8 scale                      mxfp4
    uint8 [N / 2, K], float32 scale [N, K / G]     int4, two's complement, along N, the even row in the low nibble
    int8 weight, weight_scale [N]                  int8
`pre_quant_scale` [K] multiplies the input. In W4A8, weight_scale_2 belongs to the rounding of the weight to fp8 at run
time, and not to the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpass.codecs.fp8 import SCALES
from qpass.dtype import FLOAT8, FLOATS
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.codec_reads import (
    FP4_LOCAL,
    FP8_STATIC,
    FP8_TOKEN,
    INT8_STATIC,
    check_scale,
    spec_of,
    static_scale,
)
from qpass.formats.float_layer import float_layer, layer_shape
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_UNUSED = {
    "k_bias": "an offset of the KV cache, which is kept in the model's dtype",
    "v_bias": "an offset of the KV cache, which is kept in the model's dtype",
    "input_scale": "a static activation scale, which this machine does not need",
    "weight_scale_2": "the scale for rounding an int4 weight to fp8 at run time",
}


class ModelOptReader(Reader):
    """What is quantized is what has a `weight_scale`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        beside = checkpoint.side("hf_quant_config.json").get("quantization")
        said = beside if isinstance(beside, Mapping) else checkpoint.quantization
        self.algorithm = str(said.get("quant_algo") or "").lower()

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        tensors, path = self.checkpoint.tensors, place.path
        codes, scale = tensors.get(f"{path}.weight"), tensors.get(f"{path}.weight_scale")
        if codes is None or scale is None or len(place.shape) != 2:
            return None
        static = f"{path}.input_scale" in tensors
        if codes.dtype == "int8":
            return self._integers(place, 8, INT8_STATIC if static else None)
        if codes.dtype == "uint8" and scale.dtype in FLOATS:
            return self._integers(place, 4, FP8_STATIC if static else None)
        eight = codes.dtype in FLOAT8 or self.algorithm.startswith("w4a8")
        activation = None if not static else FP8_STATIC if eight else FP4_LOCAL
        if "per_token" in self.algorithm:
            activation = FP8_TOKEN
        found = float_layer(self.checkpoint, path, place.shape, factor="weight_scale_2", activation=activation)
        if found is None:
            raise CheckpointError(f"{path}.weight in {codes.file} is {codes}, with scales {scale}: no form of ModelOpt "
                                  "that this version knows")
        return self._scaled(found, place)

    def _scaled(self, found: WeightRead, place: Place) -> WeightRead:
        """The same read, of a layer whose input is multiplied by `pre_quant_scale` first, if the files have one."""
        name, one = f"{place.path}.pre_quant_scale", found.read
        if name not in self.checkpoint.tensors:
            return found
        self.checkpoint.need(name, of=place.path, dtype=SCALES, shape=(place.shape[1],))

        def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
            made = one(tensors, spec)
            check_scale(tensors["pre_quant_scale"], "pre_quant_scale")
            return CanonicalWeight({**made.tensors, "pre_scale": tensors["pre_quant_scale"]})

        return replace(found, read=read, tensors={**found.tensors, "pre_quant_scale": name})

    def _integers(self, place: Place, bits: int, activation: ActivationArgs | None) -> WeightRead:
        path, (n, k) = place.path, place.shape
        groups = self._groups(path, n)
        if k % groups:
            raise CheckpointError(f"{self.checkpoint.path}: {path}.weight_scale has {groups} groups for {k} inputs")
        size = None if groups == 1 and bits == 8 else k // groups
        args = WeightArgs(bits=bits, granularity="per_channel" if size is None else "per_group", group_size=size)
        self.checkpoint.need(f"{path}.weight", of=path, dtype="int8" if bits == 8 else "uint8",
                             shape=(n, k) if bits == 8 else (-(-n // 2), k))
        names = {name: f"{path}.{name}" for name in ("weight", "weight_scale", "pre_quant_scale")
                 if f"{path}.{name}" in self.checkpoint.tensors}
        if "pre_quant_scale" in names:
            self.checkpoint.need(names["pre_quant_scale"], of=path, shape=(k,))
        if bits == 8 and activation is None and "per_token" in self.algorithm:
            activation = ActivationArgs()
        names |= static_scale(self.checkpoint, path, activation)
        return WeightRead(spec=spec_of(args, place.shape, activation), tensors=names, read=_read_integers)

    def _groups(self, path: str, n: int) -> int:
        scale = self.checkpoint.tensors[f"{path}.weight_scale"]
        count = 1
        for dim in scale.shape:
            count *= dim
        if count == 1:
            return 1
        if scale.shape[0] != n or count % n or len(scale.shape) > 2:
            raise CheckpointError(f"{path}.weight_scale in {scale.file} is {list(scale.shape)}, which fits no groups "
                                  f"of {n} rows")
        return count // n

    def shape_of(self, path: str) -> tuple[int, int] | None:
        tensors = self.checkpoint.tensors
        codes, scale = tensors.get(f"{path}.weight"), tensors.get(f"{path}.weight_scale")
        if codes is None or scale is None or len(codes.shape) != 2:
            return None
        if codes.dtype == "uint8" and scale.dtype == "float32":
            return scale.shape[0], codes.shape[1]
        return layer_shape(self.checkpoint, path)

    def leftover(self, name: str) -> str | None:
        return _UNUSED.get(name.rpartition(".")[2])


def _read_integers(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    q, scale = tensors["weight"], tensors["weight_scale"]
    check_scale(scale, "weight_scale")
    if q.dtype == torch.uint8:
        low = (q << 4).view(torch.int8) >> 4  # arithmetic shifts, so that the nibble's sign is kept
        q = torch.stack([low, q.view(torch.int8) >> 4], dim=1).flatten(0, 1)[:spec.out_features]
    scale = scale.reshape(-1, spec.groups) if scale.numel() > 1 else scale.reshape(1, 1).expand(spec.out_features, 1)
    made = {"qweight": q.contiguous(), "scale": scale.contiguous()}
    if "pre_quant_scale" in tensors:
        check_scale(tensors["pre_quant_scale"], "pre_quant_scale")
        made["pre_scale"] = tensors["pre_quant_scale"]
    return CanonicalWeight(made)


def _claims(path: Path, config: Mapping[str, Any]) -> bool:
    return not config.get("quantization_config") and (path / "hf_quant_config.json").is_file()


register_format(Format(
    name="modelopt", title="ModelOpt", methods=("modelopt", "modelopt_fp4", "modelopt_mixed"), reader=ModelOptReader,
    claims=_claims, reads="FP8 (tensor, channel, block), NVFP4, MXFP4, MXFP8, INT4 AWQ, W4A8 AWQ, INT8 SmoothQuant",
    runs="int4 and int8 native, floats as stored"))
