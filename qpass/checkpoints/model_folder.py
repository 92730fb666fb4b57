"""Model folder: a Hugging Face folder in, its model out, weights or none; only safetensors, only known classes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from qpass.errors import CheckpointError, QPassError

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                    "chat_template.*")


def check_folder(source: str | Path) -> Path:
    """The path, if a model folder is there; raises CheckpointError otherwise."""
    folder = Path(source)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; give a Hugging Face model folder (models are not downloaded)")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is no Hugging Face model folder")
    return folder


def is_quantized(folder: Path) -> bool:
    """Whether the folder's config.json says that its weights are quantized, by whatever library."""
    return bool(_config(folder).get("quantization_config"))


def load_meta(source: Any) -> Any:
    """The model of a folder's config.json, or of a config, on the meta device: no weight is read, no memory taken."""
    is_folder = isinstance(source, (str, os.PathLike))
    config = _transformers_config(check_folder(os.fspath(source))) if is_folder else source
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"the model in {source if is_folder else 'this config'} is quantized already; a plan is "
                              "made from the float model")
    # Attention must be one that traces without looking at numbers; eager mode and sdpa both do.
    with torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=getattr(config, "dtype", None) or torch.float32).eval()


def load_float(folder: Path) -> Any:
    """The model with its weights, in the dtype they are stored in; from safetensors only."""
    config = _transformers_config(folder)
    try:
        return _model_class(config).from_pretrained(folder, config=config, dtype="auto", use_safetensors=True,
                                                    local_files_only=True).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the model in {folder} cannot be loaded: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "safetensors_rust" and type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"a weights file in {folder} is damaged: {error}") from error


class TokenizerFiles:
    """The tokenizer files of a folder, unread; what `qpass.save(..., tokenizer=TokenizerFiles(source))` copies."""

    def __init__(self, source: Path) -> None:
        self.paths = sorted({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()})

    def save_pretrained(self, target: Path) -> None:
        """Copy them to `target`."""
        for path in self.paths:
            shutil.copyfile(path, target / path.name)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / 'config.json'} should hold an object, and holds {type(found).__name__}")
    return found


def _transformers_config(folder: Path) -> Any:
    _config(folder)
    try:
        import transformers
    except ImportError as error:
        raise QPassError("model folders need Transformers: pip install 'qpass-torch[hf]'") from error
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"Transformers {transformers.__version__} cannot read {folder / 'config.json'}: {error}"
                              ) from error


def _model_class(config: Any) -> Any:
    """The class that the config names, or the causal language model of its type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise CheckpointError(f"Transformers {transformers.__version__} has no model class for {type(config).__name__}")
