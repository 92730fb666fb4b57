"""compressed-tensors: checkpoints of LLM Compressor and of qpass, read by their config's groups and targets."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from qpass.codecs.fp8 import SCALES
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.codec_reads import codec_read
from qpass.formats.compressed_tensors import names_found, read_rows, read_weight, words_of
from qpass.formats.compressed_tensors_config import METHOD, LayerConfig, read_config
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import RowCodec, codec_of, tensor_on_disk
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_BESIDE = ("weight_g_idx", "pre_quant_scale", "weight_zero_point")  # of zeros, where symmetric; older versions wrote it
_ROWWISE = {"weight_packed", "weight", "weight_scale", "weight_shape", "input_scale", "input_zero_point"}


def _read_mixed(size: int, tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    return CanonicalWeight({**read_weight(tensors, spec).tensors, "hadamard": torch.tensor(size)})


class CompressedTensorsReader(Reader):
    """Targets by name, `re:` and class, `ignore` first; each layer in the packing that is there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.config: LayerConfig = read_config(checkpoint.quantization, str(checkpoint.path / "config.json"))
        self.storage = self.config.storage
        self.tied = self.config.tied
        self.recipe = self.config.recipe

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        classes = () if place.path == place.name else place.classes
        group = self.config.group_of(place.path, classes)
        mixed = self.config.mixed(place.path, classes, place.shape[-1]) if place.linear and len(place.shape) == 2 else (
            None)
        if group is None or len(place.shape) != 2:
            self._refuse_mixed(place, mixed)
            return None
        tensors = self.checkpoint.tensors
        if f"{place.path}.weight_scale" not in tensors and (not place.linear or self._is_float(place.path)):
            self._refuse_mixed(place, mixed)
            return None
        n, k = place.shape
        if isinstance(codec := codec_of(group.weight), RowCodec):
            self._refuse_mixed(place, mixed)
            stored = {name: f"{place.path}.{tensor_on_disk(name)}" for name in codec.names}
            return codec_read(self.checkpoint, place.path, group.weight, place.shape, stored, group.activation)
        try:
            spec = group.spec(n, k)
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: config.json group {group.name!r} on {place.path}: {error}"
                                  ) from error
        names = names_found(spec, lambda name: f"{place.path}.{name}" in tensors)
        self._check(place.path, spec, names, group.name)
        names += tuple(name for name in _BESIDE if name not in names and f"{place.path}.{name}" in tensors)
        return WeightRead(spec=spec, tensors={name: f"{place.path}.{name}" for name in names},
                          read=read_weight if mixed is None else partial(_read_mixed, mixed),
                          by_rows=None if mixed is not None or not _ROWWISE.issuperset(names) else read_rows)

    def _refuse_mixed(self, place: Place, mixed: int | None) -> None:
        if mixed is not None:
            raise CheckpointError(f"{self.checkpoint.path}: transform_config mixes the input of {place.path}, which "
                                  "this version does for weights in integers alone")

    def _is_float(self, path: str) -> bool:
        """Whether the files have it in float though a target means it: `ignore` may name it as its tool called it."""
        stored = self.checkpoint.tensors.get(f"{path}.weight")
        return stored is not None and stored.dtype in SCALES

    def leftover(self, name: str) -> str | None:
        if self.config.mixings and name.endswith("_input.weight"):
            return "the Hadamard matrix of a transform, which is known"
        unused = name.endswith(".input_global_scale")
        return "a static activation scale, which this machine does not need" if unused else None

    def shape_of(self, path: str) -> tuple[int, int] | None:
        group, tensors = self.config.group_of(path, ("Linear",)), self.checkpoint.tensors
        scale = tensors.get(f"{path}.weight_scale")
        if group is None or scale is None:
            return None
        stored = tensors.get(f"{path}.weight")
        if stored is not None and len(stored.shape) == 2:
            return stored.shape[0], stored.shape[1]
        stored = tensors.get(f"{path}.weight_packed")
        if stored is None or len(stored.shape) != 2:
            return None
        size = group.weight.group_size
        if size is not None and len(scale.shape) == 2:
            return stored.shape[0], scale.shape[1] * size
        return stored.shape[0], stored.shape[1] * 32 // group.weight.bits

    def unmatched(self, paths: Iterable[str]) -> str | None:
        known = set(paths)
        if not known:
            targets = [target for group in self.config.groups for target in group.targets]
            return f"config.json calls layers quantized that the model does not have ({', '.join(targets[:5])})"
        for path in self.storage:
            if path not in known and self.config.group_of(path, ()) is not None:
                return f"config.json says that {path} is quantized, and the model has no such module or parameter"
        return None

    def _check(self, path: str, spec: LinearSpec, names: tuple[str, ...], group: str) -> None:
        n, k, bits = spec.out_features, spec.in_features, spec.weight.bits
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {
            "weight_packed": ("int32", (n, -(-k * bits // 32))), "weight": ("int8", (n, k)),
            "weight_shape": (("int64", "int32"), (2,))}
        stored = self.checkpoint.tensors.get(f"{path}.weight_packed")
        if stored is not None and stored.shape == (n, words_of(bits, k)[1]):
            expected["weight_packed"] = "int32", stored.shape
        for name in names:
            dtype, shape = expected.get(name, (None, None))
            self.checkpoint.need(f"{path}.{name}", dtype=dtype, shape=shape,
                                 of=f"{path}, which config.json makes {group!r} ({bits}-bit [{n}, {k}]),")


register_format(Format(
    name=METHOD, title="compressed-tensors", methods=(METHOD,), reader=CompressedTensorsReader,
    reads="pack-quantized and int-quantized, 2 to 8 bits, symmetric and asymmetric, group, channel and tensor; "
          "float-quantized, nvfp4, mxfp4, mxfp6, mxfp8, mixed-precision",
    runs="integers native, floats as stored"))
