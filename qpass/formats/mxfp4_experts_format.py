"""MXFP4 experts: `quant_method` mxfp4, fused 3-D experts as `<name>_blocks` and `<name>_scales`.

Source: Transformers 5.23, integrations/mxfp4.py, convert_moe_packed_tensors. Blocks are uint8 [E, R, K / 32, 16], the
even element in the low nibble, scales uint8 [E, R, K / 32]; the model's parameter is [E, K, R], transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import CheckpointError
from qpass.formats.codec_reads import spec_of
from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.scheme import WeightArgs
from qpass.weight import CanonicalWeight, dequantize_weight

_ARGS = WeightArgs(bits=4, type="mxfp4", granularity="per_group", group_size=32)


class Mxfp4ExpertsReader(Reader):
    """What is quantized is what has `_blocks` and `_scales`."""

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        names = {"blocks": f"{place.name}_blocks", "scales": f"{place.name}_scales"}
        blocks = self.checkpoint.tensors.get(names["blocks"])
        if blocks is None:
            return None
        if len(place.shape) != 3 or len(blocks.shape) != 4:
            raise CheckpointError(f"{names['blocks']} in {blocks.file} is {blocks}, for {list(place.shape)}")
        experts, rows, groups, size = blocks.shape
        if (experts, groups * 32, rows, size) != (*place.shape, 16):
            raise CheckpointError(f"{names['blocks']} in {blocks.file} is {blocks}, which does not make up "
                                  f"{list(place.shape)}")
        self.checkpoint.need(names["blocks"], of=place.path, dtype=torch.uint8)
        self.checkpoint.need(names["scales"], of=place.path, dtype=torch.uint8, shape=(experts, rows, groups))

        def read(tensors: dict[str, Tensor]) -> Tensor:
            if bool((tensors["scales"] == 255).any()):
                raise ValueError(f"{names['scales']} holds NaN")
            flat = CanonicalWeight({"packed": tensors["blocks"].reshape(experts * rows, -1),
                                    "scale": tensors["scales"].reshape(experts * rows, -1)})
            decoded = dequantize_weight(flat, spec_of(_ARGS, (experts * rows, groups * 32)), torch.bfloat16)
            return decoded.view(experts, rows, -1).transpose(1, 2).contiguous()

        return FloatRead(tensors=names, read=read, note="decoded to float: experts of mxfp4 are not packed yet")

    def shape_of(self, path: str) -> tuple[int, int] | None:
        return None


register_format(Format(
    name="mxfp4", title="MXFP4 experts", methods=("mxfp4",), reader=Mxfp4ExpertsReader,
    reads="fused experts as blocks and scales", runs="decoded to bfloat16, which holds every MXFP4 number"))
