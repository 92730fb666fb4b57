"""Registration: makes `quantization_config=qpass.QPassConfig(...)` known to Transformers, once."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from qpass.hf import checkpoints
from qpass.hf.qpass_config import METHOD
from qpass.hf.qpass_config import QPassConfig as QPassConfig
from qpass.hf.quantizer import QPassQuantizer, refuse_quantized


def register() -> None:
    """Add our configs and quantizers to Transformers' tables; importing this module does. Again is no harm.

    What Transformers would say of a checkpoint that is quantized already names neither the recipe nor a way on, and it
    has no hook for that: its merging of the two configs is ours where the one that was passed is, and where none was
    and the checkpoint is one for `checkpoints.loaded_here`.
    """
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QPassConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = QPassQuantizer
    checkpoints.register(AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
    theirs = AutoHfQuantizer.merge_quantization_configs

    def merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, QPassConfig):
            return merge_configs(quantization_config, quantization_config_from_args)
        if quantization_config_from_args is None and checkpoints.loaded_here(quantization_config):
            return checkpoints.CheckpointConfig()
        return theirs(quantization_config, quantization_config_from_args)

    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)  # type: ignore[method-assign, assignment]


def merge_configs(of_checkpoint: Any, ours: QPassConfig) -> Any:
    """The config to load a quantized checkpoint by, where the user gave `ours`. Raises RecipeError if it cannot be."""
    if ours.recipe is None:
        return checkpoints.CheckpointConfig(exact=ours.exact)
    refuse_quantized(of_checkpoint, ours)


register()
