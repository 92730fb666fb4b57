"""GGUF rotary embedding: what a file says of how positions are stretched in, `rope_parameters` of the config out.

Transformers' tables leave most of it out, so that the config would keep its class's default. `linear` and `yarn` stand
in the metadata. Stretching by bands of frequencies stands in a tensor of factors, one a frequency, that llama.cpp's
converter computes from four numbers (convert_hf_to_gguf.py, generate_extra_tensors): which of Transformers' ways gives
these factors is tried.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from qpass.errors import CheckpointError
from qpass.formats.gguf_file import PLAIN, GgufFile

FACTORS = "rope_freqs.weight"
_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
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
    kept = {name: value for name, value in before.items() if name in ("rope_theta", "partial_rotary_factor")}
    after = {**kept, "rope_type": "default"}
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
        after = _by_factors(config, file, after)
    config.rope_parameters = after


def _by_factors(config: Any, file: GgufFile, plain: dict[str, Any]) -> dict[str, Any]:
    """The parameters that divide each frequency of `plain` by the file's factor for it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    info = file.tensors[FACTORS]
    if info.kind not in PLAIN or len(info.shape) != 1:
        raise CheckpointError(f"{FACTORS} in {file.path} is {info.kind} {list(info.shape)}, not a factor a frequency")
    factors = file.read(FACTORS).float()
    largest = float(f"{float(factors.max()):.6g}")
    if largest == 1.0 == float(factors.min()):
        return plain
    theta = float(plain.get("rope_theta") or 10000.0)
    wanted = theta ** -(torch.arange(len(factors)) / len(factors)) / factors
    for kind, frequencies in ROPE_INIT_FUNCTIONS.items():
        tried = copy.deepcopy(config)
        tried.rope_parameters = {**plain, "rope_type": kind, "rope_theta": theta, "factor": largest, **_BANDS}
        try:
            found, scaling = frequencies(tried, torch.device("cpu"))
        except (KeyError, TypeError, AttributeError, ValueError):
            continue  # a way that needs other numbers
        if scaling == 1.0 and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=0):
            return dict(tried.rope_parameters)
    raise CheckpointError(f"{FACTORS} in {file.path} holds factors (up to {largest:g}) that no rotary embedding of "
                          "Transformers has; convert the model to safetensors")
