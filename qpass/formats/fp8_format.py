"""FP8: `quant_method` fp8, fbgemm_fp8 and mxfp8, float8 weights with scales by tensor, row, block or group of 32.

Sources: Transformers 5.23, integrations/finegrained_fp8.py and fbgemm_fp8.py. `weight_scale_inv` multiplies, whatever
its name says; a last block of a row or column may be smaller. FP4 experts in int8 bytes are read as mxfp4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qpass.codecs.fp8 import SCALES, scale_shape
from qpass.dtype import FLOAT8
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint, Stored
from qpass.formats.codec_reads import FP8_STATIC, FP8_TOKEN, check_scale, fp8_args, spec_of
from qpass.formats.float_layer import float_layer
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import ActivationArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_UNUSED = {"input_scale": "a static activation scale", "activation_scale": "a static activation scale",
           "input_scale_ub": "an upper bound of activation scales"}


class Fp8Reader(Reader):
    """What is quantized is what has a scale; the config only says the size of blocks."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.block = _block(checkpoint.quantization, str(checkpoint.path / "config.json"))

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        if len(place.shape) == 3:
            return self._decoded(place)
        scale = next((name for name in ("weight_scale_inv", "weight_scale")
                      if f"{place.path}.{name}" in self.checkpoint.tensors), None)
        if scale is None:
            return None
        return float_layer(self.checkpoint, place.path, place.shape, scale=scale, block=self.block,
                           activation=self._activation(place.path))

    def stack(self, place: Place) -> tuple[WeightRead, ...]:
        codes, scale = self._stacked(place.name)
        if codes is None or scale is None:
            return ()
        names = {"weight": place.name, "scale": scale}
        experts, n, k = place.shape
        self.checkpoint.need(place.name, of=place.path, shape=(experts, k, n) if place.transposed else place.shape)
        there = self.checkpoint.tensors[scale]
        table = there.shape[:0:-1] if place.transposed else there.shape[1:]
        try:
            args = fp8_args((n, k), table, self.block)
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {place.path}: {error}") from error
        self.checkpoint.need(scale, of=place.path, dtype=SCALES, shape=(experts, *there.shape[1:]))

        def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
            check_scale(tensors["scale"], scale)
            found = {name: tensor.t().contiguous() if place.transposed and tensor.dim() == 2 else tensor
                     for name, tensor in tensors.items()}
            found["scale"] = found["scale"].reshape(scale_shape(spec.weight, spec.shape))
            return CanonicalWeight(found)

        return (WeightRead(spec=spec_of(args, (n, k), self._activation(place.path)), tensors=names, read=read),)

    def _stacked(self, name: str) -> tuple[Stored | None, str | None]:
        """A fused parameter's codes, and the name of its scales."""
        codes = self.checkpoint.tensors.get(name)
        scale = next((f"{name}_{suffix}" for suffix in ("scale_inv", "scale")
                      if f"{name}_{suffix}" in self.checkpoint.tensors), None)
        return (codes if codes is not None and codes.dtype in FLOAT8 and len(codes.shape) == 3 else None), scale

    def _decoded(self, place: Place) -> FloatRead | None:
        """A stack whose module's way of computing is not known: float, as the model stores it."""
        codes, scale = self._stacked(place.name)
        if codes is None or scale is None:
            return None
        self.checkpoint.need(place.name, of=place.path, shape=place.shape)
        experts, rows, columns = place.shape
        table = self.checkpoint.tensors[scale].shape
        sides = (*table[1:], 1, 1)[:2]
        sizes = [size if side == 1 else 1 if side == size else (self.block or (128, 128))[0]
                 for side, size in zip(sides, (rows, columns), strict=True)]
        if table[:1] != (experts,) or any(side != -(-size // step) for side, size, step in
                                          zip(sides, (rows, columns), sizes, strict=True)):
            raise CheckpointError(f"{scale} in {codes.file} is {list(table)}, which fits no blocks of "
                                  f"{list(place.shape)}")

        def read(tensors: dict[str, Tensor]) -> Tensor:
            check_scale(tensors["scale"], scale)
            spread = tensors["scale"].float().reshape(experts, *sides)
            for dim, (step, size) in enumerate(zip(sizes, (rows, columns), strict=True), start=1):
                spread = spread.repeat_interleave(step, dim=dim).narrow(dim, 0, size)
            return tensors["weight"].float() * spread

        return FloatRead(tensors={"weight": place.name, "scale": scale}, read=read,
                         note="decoded to float: how its module computes with experts is not known")

    def _activation(self, path: str) -> ActivationArgs | None:
        if self.checkpoint.quantization.get("activation_scheme") == "static":
            return FP8_STATIC if f"{path}.input_scale" in self.checkpoint.tensors else None
        return FP8_TOKEN if self.block is None else replace(FP8_TOKEN, granularity="per_group",
                                                            group_size=self.block[1])

    def shape_of(self, path: str) -> tuple[int, int] | None:
        stored = self.checkpoint.tensors.get(f"{path}.weight")
        scaled = any(f"{path}.{name}" in self.checkpoint.tensors for name in ("weight_scale_inv", "weight_scale"))
        return (stored.shape[0], stored.shape[1]) if stored is not None and scaled and len(stored.shape) == 2 else None

    def listed(self) -> Iterator[tuple[str, tuple[int, ...], WeightRead | FloatRead]]:
        yield from super().listed()
        for name, stored in self.checkpoint.tensors.items():
            if self._stacked(name)[0] is not None:
                for read in self.stack(Place(path=name, name=name, shape=stored.shape)):
                    yield name, stored.shape, read

    def leftover(self, name: str) -> str | None:
        return next((why for suffix, why in _UNUSED.items() if name.endswith(suffix)), None)


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
