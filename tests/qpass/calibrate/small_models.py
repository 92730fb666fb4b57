"""Small models: one Transformers model of each architecture that calibration is tested on, and tokens for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 32}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 128}),
    "phi": ("PhiConfig", {}),
    "bert": ("BertConfig", {}),
    "mpnet": ("MPNetConfig", {}),
}
# Not among them: what tests compare with rounding to nearest has experts that see too few tokens.
MIXTURE = ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2})


# Each takes seconds: two of them stand for all where time counts.
QUICK_FIRST = [name if name in ("llama", "gpt2") else pytest.param(name, marks=pytest.mark.slow)
               for name in ARCHITECTURES]


def small_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers, hidden 64; weights are larger than a config's, and some channels much larger, as in real models."""
    import transformers

    config_class, own = MIXTURE if name == "mixtral" else ARCHITECTURES[name]
    sizes = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2} if name == "gpt2" else _SIZES
    config = getattr(transformers, config_class)(**{**sizes, **own})
    encoder = name in ("bert", "mpnet")
    made = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in parameter_name and "wte" not in parameter_name:
                parameter.data.mul_(4)
            elif parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()  # type: ignore[no-any-return]


def tokens(count: int = 12, length: int = 48, seed: int = 0) -> list[Tensor]:
    """Sequences [1, length] in which a few tokens are frequent, so that inputs of layers are correlated."""
    draw = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, 126)
    return [torch.multinomial(weights, length, replacement=True, generator=draw)[None] + 3 for _ in range(count)]


def output_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, or an encoder's hidden states."""
    with torch.no_grad():
        return model(ids)[0]  # type: ignore[no-any-return]


def output_error(model: nn.Module, reference: nn.Module, data: list[Tensor]) -> float:
    """Mean squared distance of the two models' outputs over the mean square of the reference's."""
    pairs = [(output_of(model, ids).double(), output_of(reference, ids).double()) for ids in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))
