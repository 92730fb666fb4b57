"""AWQ writer: packed 4-bit layers in; AutoAWQ's tensors in the GEMM order and its config out, the same integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError
from qpass.formats.bits import pack_rows
from qpass.formats.layer_writer import Writable, float_linears

_COLUMN_OF = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns stands in each nibble of a word."""


class AwqWriter:
    """Every nn.Linear of 4 bits, all of one group size; symmetric ones have a zero point of 8 everywhere."""

    name = "awq"

    def refuses(self, layer: Writable) -> str | None:
        """A sentence if AWQ has no place for this layer's numbers."""
        spec = layer.spec
        if spec.weight.type != "int" or spec.weight.bits != 4:
            return f"AWQ holds integers of 4 bits, not {spec.weight.number}"
        if spec.weight.granularity == "per_tensor":
            return "AWQ has one scale an output or group, not one a tensor"
        if spec.out_features % 8:
            return f"AWQ packs 8 outputs a word, and there are {spec.out_features}"
        if any(getattr(layer, name, None) is not None for name in ("input_order", "pre_scale")):
            return "AWQ has neither an order nor a scale of the inputs"
        if getattr(layer, "hadamard", None) is not None:
            return "AWQ does not mix inputs"
        return None

    def describe(self, layer: Writable) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what `tensors` gives, without packing anything."""
        spec, scale = layer.spec, layer.on_disk["weight_scale"][0]
        n, k, groups = spec.out_features, spec.in_features, spec.groups
        return {"qweight": (torch.int32, (k, n // 8)), "qzeros": (torch.int32, (groups, n // 8)),
                "scales": (scale, (groups, n))}

    def tensors(self, layer: Writable) -> dict[str, Tensor]:
        """The layer's tensors by name, without its path."""
        weight = layer.canonical()
        zeros = weight.zero_point if weight.zero_point is not None else torch.zeros_like(weight.scale, dtype=torch.int8)
        return {"qweight": _words(weight.qweight), "qzeros": _words(zeros), "scales": weight.scale.t().contiguous()}

    def config(self, model: nn.Module, layers: Mapping[str, Writable]) -> dict[str, Any]:
        """`quantization_config` of config.json, as plain data. CheckpointError if group sizes differ."""
        sizes = {layer.spec.weight.group_size or -1 for layer in layers.values()}
        if len(sizes) > 1:
            raise CheckpointError(f"AWQ has one group size a model, and the layers have {sorted(sizes)}; save as "
                                  "compressed-tensors or gptq")
        return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": sizes.pop(),
                "zero_point": not all(layer.spec.weight.symmetric for layer in layers.values()),
                "modules_to_not_convert": list(float_linears(model, layers)) or None}


def _words(codes: Tensor) -> Tensor:
    """int8 [N, R] centred on 0 to int32 [R, N / 8], columns interleaved."""
    rows = codes.t().unflatten(1, (-1, 8))[:, :, list(_COLUMN_OF)].flatten(1)
    return pack_rows(rows.contiguous(), 4)
