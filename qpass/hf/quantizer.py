"""QPassQuantizer: what Transformers' loading asks of a quantizer; each float tensor that it reads is packed at once.

Registered by qpass/hf/registration.py. Needs Transformers 5, whose loader reads one tensor at a time and gives those
that `param_needs_quantization` names to the operation of `get_quantize_ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from qpass.checkpoints.mapped_pages import ReadPages
from qpass.checkpoints.stream_quantize import StreamQuantizer
from qpass.errors import RecipeError
from qpass.formats.checkpoint import read_json
from qpass.formats.format_registry import format_of_folder
from qpass.hf.packed_quantizer import PackedQuantizer
from qpass.hf.qpass_config import QPassConfig


class QPassQuantizer(PackedQuantizer):
    """Quantizes a float checkpoint as it is read. The plan is made on the empty model, before the first tensor."""

    quantization_config: QPassConfig

    def __init__(self, quantization_config: QPassConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stream: StreamQuantizer | None = None
        self._device = torch.device("cpu")
        self._failed: Exception | None = None
        self._read = ReadPages()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise unless there is a recipe and every weight will have a device."""
        if self.quantization_config.recipe is None:
            raise RecipeError("the config of this checkpoint names no quantization, so QPassConfig needs a recipe: "
                              "QPassConfig('w4a8'); qpass.load(path) also reads what is quantized without saying so")
        places = list(device_map.values()) if isinstance(device_map, dict) else []
        if "disk" in places:
            raise RecipeError("device_map puts layers on the disk, where packed weights cannot run; quantized, the "
                              "model may fit: qpass.plan(path, recipe) says what it takes")
        if places:
            self._device = torch.device(places[0])

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
                                             ) -> None:
        """Keep the empty model; the plan waits until Transformers has left the meta device's context."""
        if checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            config = folder / "config.json"
            if config.is_file() and (said := read_json(config).get("quantization_config")):
                refuse_quantized(said, self.quantization_config)
            if found := format_of_folder(folder):
                raise RecipeError(f"the checkpoint in {folder} is quantized already ({found.title}), and Transformers "
                                  f"cannot read that; qpass.load({str(folder)!r}) does")
        self._model: nn.Module | None = model

    @property
    def stream(self) -> StreamQuantizer:
        """What takes the weights, made at the first question."""
        if self._stream is None:
            from qpass.plan_model import make_plan

            assert self._model is not None
            self._model.tie_weights()  # type: ignore[operator]  # as it will be when the weights are there
            plan = make_plan(self._model, self.quantization_config.recipe, device=self._device)
            self._stream, self._model = StreamQuantizer(self._model, plan), None
        return self._stream

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self._failed is None and self.stream.wants(param_name)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of an element once packed, for `device_map="auto"`."""
        decision = next((d for d in self.stream.plan.decisions if d.site.name == param_name), None)
        if decision is None or decision.status != "quantize":
            return float(param.element_size())
        return decision.bytes_packed / max(param.numel(), 1)

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self)

    def take(self, name: str, weight: Tensor) -> None:
        """Quantize one parameter. An error is kept for the end, for the loader would only log it."""
        try:
            if self._failed is None:
                self.stream.take(name, weight)
        except Exception as error:
            self._failed = error
        self._read.add(weight)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from qpass.quantize_model import finish, remember

        if self._failed is not None:
            raise self._failed
        self._read.release()
        self.stream.finish()
        remember(model, self.stream.plan)
        finish(model, self.stream.plan)
        self._stream = None
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from qpass.quantize_model import dequantize

        return dequantize(model)


class _Take(ConversionOps):
    """The loader's last operation on a tensor: hand over what is wanted, give the rest back."""

    def __init__(self, quantizer: QPassQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], source_patterns: Any = None, target_patterns: Any = None, *,
                missing_keys: set[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        rest: dict[str, Any] = {}
        for name, value in input_dict.items():
            if self._quantizer.stream.wants(name):
                self._quantizer.take(name, value[0] if isinstance(value, list) else value)
                if missing_keys is not None:
                    missing_keys.discard(name)
            else:
                rest[name] = value
        return rest


def refuse_quantized(said: Mapping[str, Any] | Any, ours: QPassConfig) -> None:
    """Raise RecipeError: a checkpoint whose config says that it is quantized, and a recipe."""
    data = said if isinstance(said, Mapping) else said.to_dict()
    method, bits = data.get("quant_method", "by an unknown method"), data.get("bits")
    what = f"{getattr(method, 'value', method)}{f', {bits} bits' if bits else ''}"
    raise RecipeError(f"the checkpoint is quantized already ({what}), and a recipe was given too ({ours}). Leave "
                      "quantization_config out to load it as it is; qpass.load(path, recipe) keeps its integers and "
                      "re-plans what activations are rounded to; or quantize the float checkpoint")
