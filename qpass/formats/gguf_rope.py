"""GGUF rotary embedding: what a file says of how positions are stretched in, `rope_parameters` of the config out.

Transformers' tables leave most of it out, so that the config would keep its class's default. llama.cpp has `linear` and
`yarn` in the metadata, and Llama 3's in a tensor of factors, one a frequency (convert_hf_to_gguf.py, generate_extra_
tensors): 1 for high frequencies, the factor for low ones, and between them what `llama3` computes from four numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qpass.errors import CheckpointError
from qpass.formats.gguf_file import PLAIN, GgufFile

FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_NAMES = {"factor": "factor", "original_context_length": "original_max_position_embeddings",
          "attn_factor": "attention_factor", "yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast",
          "yarn_beta_slow": "beta_slow"}
_PASSED_OVER = ("type", "finetuned", "yarn_ext_factor")


def set_rope(config: Any, file: GgufFile, architecture: str) -> None:
    """Put what the file says into `config.rope_parameters`. Raises CheckpointError for what no config can say.

    Configs that have no rotary embedding, or one for each kind of layer, stay as they are.
    """
    before = getattr(config, "rope_parameters", None)
    if not isinstance(before, dict) or "rope_type" not in before:
        return
    head = f"{architecture}.rope.scaling."
    said = {key.removeprefix(head): value for key, value in file.metadata.items() if key.startswith(head)}
    kind = said.get("type", "none")
    after = {"rope_theta": before.get("rope_theta"), "rope_type": "default"}
    if kind in ("linear", "yarn"):
        after = dict(before) if before["rope_type"] == kind else {**after, "rope_type": kind}
        unknown = [name for name in said if name not in (*_NAMES, *_PASSED_OVER) and said[name]]
        if unknown or not isinstance(said.get("factor"), int | float):
            raise CheckpointError(f"{file.path}: {head}{unknown[0] if unknown else 'factor'} is "
                                  f"{said[unknown[0]] if unknown else said.get('factor')!r}, which no config of "
                                  f"{architecture!r} can say; convert the model to safetensors")
        after |= {_NAMES[name]: value for name, value in said.items() if name in _NAMES}
    elif kind != "none":
        return  # its factors are tensors, which are reported as unread by their names
    theta = file.metadata.get(f"{architecture}.rope.freq_base")
    after |= {"rope_theta": theta} if isinstance(theta, int | float) else {}
    if kind == "none" and FACTORS in file.tensors:
        after |= _llama3(file, float(after["rope_theta"] or 10000.0))
    config.rope_parameters = after


def _llama3(file: GgufFile, theta: float) -> dict[str, Any]:
    info = file.tensors[FACTORS]
    if info.kind not in PLAIN or len(info.shape) != 1:
        raise CheckpointError(f"{FACTORS} in {file.path} is {info.kind} {list(info.shape)}, not a factor a frequency")
    factors = file.read(FACTORS).double()
    largest = float(f"{float(factors.max()):.6g}") if factors.numel() else 1.0  # from float32
    if largest == 1.0 == float(factors.min()):
        return {}
    if math.isfinite(largest) and torch.allclose(factors, _factors(largest, theta, info.shape[0]), rtol=1e-4):
        return {"rope_type": "llama3", "factor": largest, **_LLAMA3}
    raise CheckpointError(f"{FACTORS} in {file.path} holds factors that are not Llama 3's ({largest} for the lowest "
                          "frequency), and no config can say them; convert the model to safetensors")


def _factors(factor: float, theta: float, count: int) -> Tensor:
    """What llama.cpp's converter writes for `llama3`, one for each of `count` frequencies."""
    low, high, context = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], 8192
    lengths = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    smooth = ((context / lengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
