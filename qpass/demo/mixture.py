"""Demo MoE: the demo's model folder in, a folder with the same function as a mixture of experts out.

Every MLP is split into four experts, all chosen with equal weight: real weights in fused 3-D parameters, and a result
that differs from the dense model's by rounding only, so that accuracy can be compared with it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qpass.checkpoints.model_folder import load_float
from qpass.demo.language_model import damage, seal

EXPERTS = 4
_FOLDER = "smollm2-135m-instruct-moe4-bf16"


def moe_model(dense: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder, made from `dense` if it is not there or damaged."""
    target = cache / "models" / _FOLDER
    if target.is_dir() and damage(target) is None:
        say(f"model: its copy with {EXPERTS} experts, from {target}")
        return target
    say(f"model: making a copy of it with {EXPERTS} experts in each layer")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{_FOLDER}-") as work:
        made = Path(work) / "made"
        from transformers import AutoTokenizer

        as_moe(load_float(dense)).save_pretrained(made)
        AutoTokenizer.from_pretrained(dense).save_pretrained(made)
        seal(made)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return target


@torch.no_grad()
def as_moe(dense: Any, experts: int = EXPERTS) -> Any:
    """A model of `experts` experts a layer, all of them chosen, that computes what `dense` (with gate_proj, up_proj and
    down_proj in each MLP) does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    c = dense.config
    width = c.intermediate_size // experts
    config = AutoConfig.for_model(
        "mixtral", vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=width,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters, tie_word_embeddings=c.tie_word_embeddings, num_local_experts=experts,
        num_experts_per_tok=experts, bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id, sliding_window=None)
    moe = AutoModelForCausalLM.from_config(config, dtype=dense.dtype).eval()  # type: ignore[no-untyped-call]
    source = dense.state_dict()
    target = {}
    for name, value in moe.state_dict().items():
        prefix = name.split(".mlp.")[0] + ".mlp."
        if ".mlp." not in name:
            target[name] = source[name]
        elif name.endswith("gate.weight"):
            target[name] = torch.zeros_like(value)  # equal scores, and so equal weights
        elif name.endswith("gate_up_proj"):
            gate, up = source[prefix + "gate_proj.weight"], source[prefix + "up_proj.weight"]
            target[name] = torch.stack([torch.cat(pair) for pair in zip(gate.split(width), up.split(width),
                                                                        strict=True)])
        else:  # each expert has a weight of 1 / experts
            down = source[prefix + "down_proj.weight"]
            target[name] = torch.stack([part * experts for part in down.split(width, dim=1)])
    moe.load_state_dict(target)
    moe.tie_weights()
    moe.generation_config = dense.generation_config
    return moe
