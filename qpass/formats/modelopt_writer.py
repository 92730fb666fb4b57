"""ModelOpt writer: packed nvfp4 layers whose scales are multiplied in; ModelOpt's tensors and config out, unchanged.

compressed-tensors divides by its global scale, and a quotient seldom equals the product of ModelOpt's two scales, so
what ModelOpt or torchao made stays in this format. Source: nvidia-modelopt 0.47, export/quant_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError
from qpass.formats.layer_writer import Writable, float_linears

_GROUP = 16
_TYPES = ("nvfp4_mul", "nvfp4_mul_rows")


class ModelOptWriter:
    """Every nn.Linear in nvfp4_mul, with float activations: W4A16_NVFP4."""

    name = "modelopt"

    def refuses(self, layer: Writable) -> str | None:
        """A sentence if this format has no place for the layer's numbers."""
        if layer.spec.weight.type not in _TYPES:
            return f"it is written for nvfp4 whose scales are multiplied, not {layer.spec.weight.type}"
        if any(getattr(layer, name, None) is not None for name in ("pre_scale", "hadamard")):
            return "a scale or a mixing of the inputs is not written"
        return None

    def describe(self, layer: Writable) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what `tensors` gives, without packing anything."""
        n, k = layer.spec.shape
        return {"weight": (torch.uint8, (n, k // 2)), "weight_scale": (torch.float8_e4m3fn, (n, k // _GROUP)),
                "weight_scale_2": (torch.float32, ())}

    def tensors(self, layer: Writable) -> dict[str, Tensor]:
        """The layer's tensors by name, without its path. CheckpointError if its rows have several second scales."""
        found = layer.canonical().tensors
        second = found["scale_2"].reshape(-1)
        if not bool((second == second[0]).all()):
            raise CheckpointError("rows of one weight have different second scales, which ModelOpt's format cannot "
                                  "hold; save the model as compressed-tensors")
        return {"weight": found["packed"], "weight_scale": found["scale"], "weight_scale_2": second[0].clone()}

    def config(self, model: nn.Module, layers: Mapping[str, Writable]) -> dict[str, Any]:
        """`quantization_config` of config.json, as plain data."""
        from qpass import __version__

        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [path for path, module in model.named_modules() if module is head and path not in layers]
        return {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": _GROUP,
                "kv_cache_quant_algo": None, "ignore": [*float_linears(model, layers), *heads],
                "producer": {"name": "qpass", "version": __version__}}
