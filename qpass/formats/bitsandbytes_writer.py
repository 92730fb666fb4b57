"""bitsandbytes writer: packed nf4 and fp4 layers in; the tensors and config that Transformers reads with it out.

The same bytes, without double quantization. Source: bitsandbytes 0.50, functional.py (QuantState.as_dict).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpass.dtype import dtype_name
from qpass.formats.bitsandbytes_format import BLOCKS, STATE
from qpass.formats.layer_writer import Writable, float_linears
from qpass.layers.packed_layers import QuantLinear


class BitsAndBytesWriter:
    """Every nn.Linear in nf4, or every one in fp4, in blocks of 32 to 4096."""

    name = "bitsandbytes"

    def refuses(self, layer: Writable) -> str | None:
        """A sentence if this format has no place for the layer's numbers."""
        weight = layer.spec.weight
        if weight.type not in ("nf4", "fp4"):
            return f"bitsandbytes is written for nf4 and fp4, not {weight.number}"
        if not isinstance(layer, QuantLinear):
            return "bitsandbytes leaves experts in float"
        if weight.group_size not in BLOCKS:
            return f"its blocks have {weight.group_size} weights, those of bitsandbytes 32, 64 and so on to 4096"
        if any(getattr(layer, name, None) is not None for name in ("pre_scale", "hadamard")):
            return "a scale or a mixing of the inputs is not written"
        return None

    def describe(self, layer: Writable) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what `tensors` gives, without packing anything."""
        n, k = layer.spec.shape
        return {"weight": (torch.uint8, (-(-n * k // 2), 1)),
                "weight.absmax": (torch.float32, (-(-n * k // layer.spec.group_size),)),
                "weight.quant_map": (torch.float32, (16,)),
                f"weight.{STATE}{layer.spec.weight.type}": (torch.uint8, (len(_state(layer)),))}

    def tensors(self, layer: Writable) -> dict[str, Tensor]:
        """The layer's tensors by name, without its path."""
        found = layer.canonical().tensors
        state = torch.frombuffer(bytearray(_state(layer)), dtype=torch.uint8)
        return {"weight": found["packed"].reshape(-1, 1), "weight.absmax": found["absmax"].reshape(-1),
                "weight.quant_map": found["code"], f"weight.{STATE}{layer.spec.weight.type}": state}

    def config(self, model: nn.Module, layers: Mapping[str, Writable]) -> dict[str, Any]:
        """`quantization_config` of config.json, as plain data."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [path for path, module in model.named_modules() if module is head and path not in layers]
        first = next(iter(layers.values()))
        return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
                "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_quant_type": first.spec.weight.type,
                "bnb_4bit_compute_dtype": _dtype(first), "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_use_double_quant": False, "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
                "llm_int8_skip_modules": [*float_linears(model, layers), *heads]}


def _state(layer: Writable) -> bytes:
    weight = layer.spec.weight
    return json.dumps({"quant_type": weight.type, "blocksize": weight.group_size, "dtype": _dtype(layer),
                       "shape": list(layer.spec.shape)}).encode()


def _dtype(layer: Writable) -> str:
    assert isinstance(layer, QuantLinear)
    return dtype_name(layer.dtype)
