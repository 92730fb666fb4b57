"""MXFP4 experts: `quant_method` mxfp4, fused 3-D experts as `<name>_blocks` and `<name>_scales`.

Source: Transformers 5.23, integrations/mxfp4.py, convert_moe_packed_tensors. Blocks are uint8 [E, R, K / 32, 16], the
even element in the low nibble, scales uint8 [E, R, K / 32]; the model's parameter is [E, K, R], transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qpass.errors import CheckpointError
from qpass.formats.codec_reads import spec_of
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight

if TYPE_CHECKING:
    from torch import Tensor

_ARGS = WeightArgs(bits=4, type="mxfp4", granularity="per_group", group_size=32)


class Mxfp4ExpertsReader(Reader):
    """What is quantized is what has `_blocks` and `_scales`."""

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        if f"{place.name}_blocks" not in self.checkpoint.tensors:
            return None
        if len(place.shape) != 3:
            raise CheckpointError(f"{self.checkpoint.path}: {place.name}_blocks stands for {list(place.shape)}, which "
                                  "is no stack of experts")
        experts, k, rows = place.shape
        one, = self.stack(replace(place, shape=(experts, rows, k)))

        def read(tensors: dict[str, Tensor]) -> Tensor:
            each = [dequantize_weight(one.read({short: tensor[expert] for short, tensor in tensors.items()}, one.spec),
                                      one.spec, torch.bfloat16) for expert in range(experts)]
            return torch.stack(each).transpose(1, 2).contiguous()

        return FloatRead(tensors=one.tensors, read=read, note="decoded to float: how its module computes with experts "
                         "is not known")

    def stack(self, place: Place) -> tuple[WeightRead, ...]:
        names = {"blocks": f"{place.name}_blocks", "scales": f"{place.name}_scales"}
        if names["blocks"] not in self.checkpoint.tensors:
            return ()
        experts, rows, k = place.shape
        self.checkpoint.need(names["blocks"], of=place.path, dtype="uint8", shape=(experts, rows, k // 32, 16))
        self.checkpoint.need(names["scales"], of=place.path, dtype="uint8", shape=(experts, rows, k // 32))

        def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
            if bool((tensors["scales"] == 255).any()):
                raise ValueError(f"{names['scales']} holds NaN")
            return CanonicalWeight({"packed": tensors["blocks"].flatten(1), "scale": tensors["scales"]})

        return (WeightRead(spec=spec_of(_ARGS, (rows, k)), tensors=names, read=read),)

    def listed(self) -> Iterator[tuple[str, tuple[int, ...], WeightRead | FloatRead]]:
        for name, stored in self.checkpoint.tensors.items():
            if name.endswith("_blocks") and len(stored.shape) == 4:
                path, (experts, rows, groups, _) = name.removesuffix("_blocks"), stored.shape
                shape = (experts, rows, groups * 32)
                yield path, shape, self.stack(Place(path=path, name=path, shape=shape))[0]


register_format(Format(
    name="mxfp4", title="MXFP4 experts", methods=("mxfp4",), reader=Mxfp4ExpertsReader,
    reads="fused experts as blocks and scales", runs="as stored"))
