"""Load: a folder of safetensors in, a model with packed layers out, read one tensor at a time."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpass.checkpoint_layers import find_floats, find_layers
from qpass.errors import CheckpointError, QPassError
from qpass.fill_model import fill_floats, fill_layers, tie_tables
from qpass.formats.compressed_tensors_config import LayerConfig, read_config
from qpass.formats.safetensors_file import read_folder


def load(folder: str | PathLike[str], recipe: Any = None, device: torch.device | str | None = None, *,
         model: nn.Module | None = None) -> nn.Module:
    """The model in `folder`: quantized as its config says, or, with a recipe, a float one quantized now.

    recipe  only for a folder with a float model: anything that `quantize` takes; None loads it as it is
    device  where the model should live, by default the CPU
    model   a float model to fill, on any device; needed where the folder does not hold a Transformers model

    Reads compressed-tensors checkpoints with int weights (pack-quantized and int-quantized), written by qpass or by
    LLM Compressor. Names, shapes and dtypes are checked before memory is allocated; peak memory is the packed model
    and its largest tensor. No code from the folder is run, nothing is unpickled. Raises CheckpointError, naming the
    file or the tensor.
    """
    path = Path(folder).expanduser()
    config = _read_config_file(path)
    quantization = config.get("quantization_config") or config.get("compression_config")
    where = torch.device("cpu" if device is None else device)
    if not quantization:
        return _load_float(path, config, recipe, where, model)
    if recipe is not None:
        raise CheckpointError(f"{path} is quantized already; load it without a recipe, or give the folder of the "
                              f"float model")
    layers = read_config(quantization, str(path / "config.json"))
    return _load_packed(path, config, layers, quantization, where, model)


def _load_packed(path: Path, config: dict[str, Any], layers: LayerConfig, quantization: dict[str, Any],
                 device: torch.device, model: nn.Module | None) -> nn.Module:
    from qpass.hf import empty_model
    from qpass.quantize_model import check_model, finish, remember

    stored = read_folder(path)
    if model is None:
        model = empty_model(path, config)
    else:
        check_model(model)
    packed = find_layers(model, layers, stored, path)
    floats = find_floats(model, packed, stored, path)
    plan = _plan(model, layers, quantization)
    # A table that reads a packed head's rows is in the files for others; here it would be a second copy.
    fill_floats([item for item in floats if item.tensor not in layers.tied], stored, device)
    fill_layers(model, packed, stored, device)
    tie_tables(model, layers.tied, path)
    model.to(device)
    model.eval()
    if plan is not None:
        remember(model, plan)
    finish(model, plan)
    return model


def _load_float(path: Path, config: dict[str, Any], recipe: Any, device: torch.device,
                model: nn.Module | None) -> nn.Module:
    from qpass.hf import load_float

    stored = read_folder(path)
    if model is None:
        model = load_float(path, config)
    else:
        fill_floats(find_floats(model, [], stored, path), stored, device)
    model.to(device)
    if recipe is not None:
        from qpass.quantize_model import quantize

        quantize(model, recipe, progress=False)
    return model.eval()


def _plan(model: nn.Module, layers: LayerConfig, quantization: dict[str, Any]) -> Any:
    """What `explain` tells of each layer, planned anew on the empty model; None if that cannot be had."""
    from qpass.plan_model import make_plan

    try:
        return make_plan(model, dict(layers.recipe) if layers.recipe else dict(quantization))
    except QPassError:
        return None


def _read_config_file(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; load takes a folder with config.json and safetensors files")
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json, so nothing says what model it holds") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, not the fields of a config")
    return config
