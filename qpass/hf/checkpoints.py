"""Checkpoints through Transformers: `from_pretrained` of a quantized folder in, the model that qpass.load makes out.

A quantizer of Transformers for the formats that it does not know, that it lacks a package for, or that the user asked
to have loaded here with `quantization_config=qpass.QPassConfig()`. Its loader reads nothing: the model's parts are set
aside while it runs, and come back with their weights in place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from qpass.errors import CheckpointError
from qpass.hf.packed_quantizer import PackedQuantizer

METHOD = "qpass-checkpoint"
# What Transformers' own loading of a format needs; an empty name for what it cannot load.
_NEEDS = {"gptq": "gptqmodel", "awq": "gptqmodel", "auto-round": "auto_round", "quanto": "optimum", "quark": "quark",
          "hqq": "", "fbgemm_fp8": "fbgemm_gpu", "torchao": "torchao",
          "compressed-tensors": "compressed_tensors"}

# With nothing in it, Transformers expects no key, reads no tensor and initializes no weight.
_EMPTY: dict[str, Any] = {"_modules": {}, "_parameters": {}, "_buffers": {}, "all_tied_weights_keys": {},
                          "_keys_to_ignore_on_load_unexpected": {".*"}, "_is_hf_initialized": True}


class CheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, as its tool wrote it; `quant_method` stays that tool's."""

    def __init__(self, *, exact: bool = False, **said: Any) -> None:
        self.quant_method = said.pop("quant_method", METHOD)
        self.said, self.exact = said, exact

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **self.said}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made


class CheckpointQuantizer(PackedQuantizer):
    """Loads the whole checkpoint with qpass.load, in the dtype and the device that Transformers was asked for."""

    quantization_config: CheckpointConfig

    def __init__(self, quantization_config: CheckpointConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._device, self._folder = torch.device("cpu"), Path()
        self._aside: dict[str, Any] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise unless all weights go to one device."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if len(places) > 1 or "disk" in places:
            raise CheckpointError(f"device_map spreads the checkpoint over {', '.join(sorted(places))}; packed layers "
                                  "are loaded to one device: device_map='cpu', or qpass.load(path, device=...)")
        if places:
            self._device = torch.device(next(iter(device_map.values())))

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
                                             ) -> None:
        if not checkpoint_files:
            raise CheckpointError("no weights files were found beside config.json; qpass.load(path) reads a folder")
        self._folder = Path(checkpoint_files[0]).parent
        own: Any = model
        self._dtype = own.dtype
        self._aside = {name: vars(model)[name] for name in _EMPTY if name in vars(model)}
        model.__dict__.update(copy.deepcopy(_EMPTY))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from qpass.hf.model_config import empty_like
        from qpass.load_model import load

        model.__dict__.update(self._aside)
        config: Any = model.config
        config.__dict__.pop("quantization_config", None)
        empty, exact = empty_like(type(model), config, self._folder, self._dtype), self.quantization_config.exact
        made = load(self._folder, model=empty, device=self._device, exact=exact)
        for part in ("_modules", "_parameters", "_buffers", "_qpass_plan", "config"):
            if part in made.__dict__:
                model.__dict__[part] = made.__dict__[part]
        return model


def ours(known: Mapping[str, Any]) -> list[str]:
    """The values of quant_method that qpass reads and Transformers, which knows `known`, does not or cannot here."""
    from qpass.formats.format_registry import formats

    every = {method for made in formats().values() for method in made.methods}
    return sorted(method for method in every if method not in known or (
        method in _NEEDS and not (_NEEDS[method] and find_spec(_NEEDS[method]) is not None)))


def loaded_here(said: Any) -> bool:
    """Whether a checkpoint is loaded here unless the user asks for another config: one that qpass saved, so that what
    comes back is the model that was saved, or one of bitsandbytes, whose config Transformers keeps to itself, without
    that package."""
    if not isinstance(said, Mapping):
        return False
    method = said.get("quant_method")
    return (method == "compressed-tensors" and "qpass" in said) or (
        method == "bitsandbytes" and find_spec("bitsandbytes") is None)


def register(configs: dict[str, Any], quantizers: dict[str, Any]) -> None:
    """Add what is ours to Transformers' tables of configs and of quantizers, by quant_method."""
    for method in (METHOD, *ours(quantizers)):
        configs[method], quantizers[method] = CheckpointConfig, CheckpointQuantizer
