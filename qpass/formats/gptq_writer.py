"""GPTQ writer: packed layers in; GPTQ's tensors and quantize_config out, the same integers and scales.

Version 1, which every reader knows, stores each zero point less one; version 2 stores it as it is. GPTQModel takes
asymmetric weights of others in version 2 only: in version 1 a zero point of 0 borrows from its neighbour.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qpass.formats.bits import pack_rows
from qpass.formats.layer_writer import Writable, float_linears
from qpass.spec import LinearSpec

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class GptqWriter:
    """Every nn.Linear of 2, 3, 4 or 8 bits; `g_idx` is always written, `dynamic` says what differs from the rest."""

    def __init__(self, version: Literal[1, 2]) -> None:
        self.name = "gptq" if version == 1 else "gptq_v2"
        self._version = version

    def refuses(self, layer: Writable) -> str | None:
        """A sentence if GPTQ has no place for this layer's numbers."""
        spec = layer.spec
        bits, n, k = spec.weight.bits, spec.out_features, spec.in_features
        if spec.weight.type != "int" or bits not in (2, 3, 4, 8):
            return f"GPTQ holds integers of 2, 3, 4 and 8 bits, not {spec.weight.number}"
        if spec.weight.granularity == "per_tensor":
            return "GPTQ has one scale an output or group, not one a tensor"
        if n * bits % 32 or k * bits % 32:
            return f"GPTQ fills whole int32 words, and [{n}, {k}] of {bits} bits does not"
        if getattr(layer, "pre_scale", None) is not None:
            return "GPTQ has no scale of the inputs"
        if getattr(layer, "hadamard", None) is not None:
            return "GPTQ does not mix inputs"
        return None

    def describe(self, layer: Writable) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what `tensors` gives, without packing anything."""
        spec, scale = layer.spec, layer.on_disk["weight_scale"][0]
        n, k, bits, groups = spec.out_features, spec.in_features, spec.weight.bits, spec.groups
        return {"g_idx": (torch.int32, (k,)), "qweight": (torch.int32, (k * bits // 32, n)),
                "qzeros": (torch.int32, (groups, n * bits // 32)), "scales": (scale, (groups, n))}

    def tensors(self, layer: Writable) -> dict[str, Tensor]:
        """The layer's tensors by name, without its path."""
        spec, weight = layer.spec, layer.canonical()
        bits, order = spec.weight.bits, getattr(layer, "input_order", None)
        codes, g_idx = weight.qweight, torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
        if order is not None:
            back = order.long().argsort()
            codes, g_idx = codes[:, back], (back // spec.group_size).to(torch.int32)
        zeros = weight.zero_point if weight.zero_point is not None else torch.zeros_like(weight.scale, dtype=torch.int8)
        return {"g_idx": g_idx, "qweight": pack_rows(codes.contiguous(), bits).t().contiguous(),
                "qzeros": self._zeros(zeros.t().contiguous(), bits), "scales": weight.scale.t().contiguous()}

    def config(self, model: nn.Module, layers: Mapping[str, Writable]) -> dict[str, Any]:
        """`quantization_config` of config.json, as plain data."""
        said = {path: self._settings(layer.spec) for path, layer in layers.items()}
        most = Counter(tuple(sorted(one.items())) for one in said.values()).most_common(1)[0][0]
        base: dict[str, Any] = dict(most)
        dynamic: dict[str, Any] = {f"+:^{re.escape(path)}$": one for path, one in said.items()
                                   if one != base}
        for path in float_linears(model, layers):
            dynamic[f"-:^{re.escape(path)}$"] = {}
        from qpass import __version__

        ordered = any(getattr(layer, "input_order", None) is not None for layer in layers.values())
        return {"quant_method": "gptq", "checkpoint_format": self.name, "desc_act": ordered,
                "lm_head": "lm_head" in layers, "static_groups": False, "true_sequential": True, **base,
                "dynamic": dynamic,
                "meta": {"quantizer": [f"qpass:{__version__}"]}}

    @staticmethod
    def _settings(spec: LinearSpec) -> dict[str, Any]:
        return {"bits": spec.weight.bits, "group_size": spec.weight.group_size or -1, "sym": spec.weight.symmetric}

    def _zeros(self, zero_point: Tensor, bits: int) -> Tensor:
        """int8 [G, N] to int32 words; version 1 subtracts one, from whole words where fields do not straddle them."""
        if self._version == 2:
            return pack_rows(zero_point, bits)
        if bits not in _ONES:
            half = 1 << bits - 1
            return pack_rows(((zero_point.int() + half - 1) % (2 * half) - half).to(torch.int8), bits)
        return (pack_rows(zero_point, bits).long() - _ONES[bits]).to(torch.int32)
