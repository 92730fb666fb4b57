"""Find on models of Transformers: every matrix of every family is a site, with the right orientation and swap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qpass.capture.capture_model import capture
from qpass.find.find_sites import find

_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
_MOE = {**_DECODER, "num_experts_per_tok": 2}

# config class, model class, config, then how many sites of each (kind, swap, transposed)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[tuple[str, str | None, bool], int]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER,
              {("embedding", "module", False): 1, ("linear", "module", False): 15}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER,
              {("embedding", "module", False): 1, ("linear", "module", False): 15}),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_DECODER, "tie_word_embeddings": True},
               {("embedding", None, False): 1, ("linear", "module", False): 15}),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
              {("embedding", None, False): 1, ("embedding", "module", False): 1, ("linear", "module", False): 1,
               ("linear", "module", True): 8}),
    "Qwen3-MoE": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MOE, "num_experts": 4, "moe_intermediate_size": 16},
                  {("embedding", "module", False): 1, ("linear", "module", False): 9,
                   ("linear", "parameter", False): 2, ("experts", "module", False): 4}),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_MOE, "num_local_experts": 4},
                {("embedding", "module", False): 1, ("linear", "module", False): 9,
                 ("linear", "parameter", False): 2, ("experts", "module", False): 4}),
    "OLMoE": ("OlmoeConfig", "OlmoeForCausalLM", {**_MOE, "num_experts": 4},
              {("embedding", "module", False): 1, ("linear", "module", False): 9,
               ("linear", "parameter", False): 2, ("experts", "module", False): 4}),
    "DeepSeek-V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM",
                    {**_SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
                     "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
                     "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
                     "tie_word_embeddings": False},
                    {("embedding", "module", False): 1, ("linear", "module", False): 17,
                     ("linear", "parameter", False): 1, ("experts", "module", False): 2}),
    "GPT-OSS": ("GptOssConfig", "GptOssForCausalLM", {**_MOE, "num_local_experts": 4},
                {("embedding", "module", False): 1, ("linear", "module", False): 9,
                 ("linear", "parameter", False): 2, ("experts", "module", True): 4}),
    "BERT": ("BertConfig", "BertModel", _SIZES, {("embedding", "module", False): 3, ("linear", "module", False): 13}),
    "MPNet": ("MPNetConfig", "MPNetModel", _SIZES,
              {("embedding", "module", False): 3, ("linear", "module", False): 13}),
    "T5": ("T5Config", "T5ForConditionalGeneration",
           {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 96,
            "decoder_start_token_id": 0, "tie_word_embeddings": True},
           {("embedding", None, False): 1, ("embedding", "module", False): 2,
            ("linear", "module", False): 17}),
    "Phi": ("PhiConfig", "PhiForCausalLM", {**_SIZES, "tie_word_embeddings": False},
            {("embedding", "module", False): 1, ("linear", "module", False): 13}),
    "OPT": ("OPTConfig", "OPTForCausalLM",
            {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
             "word_embed_proj_dim": 32, "max_position_embeddings": 64},
            {("embedding", None, False): 2, ("linear", "module", False): 13}),
    "ViT": ("ViTConfig", "ViTModel", {**{k: v for k, v in _SIZES.items() if k != "vocab_size"}, "image_size": 32,
                                      "patch_size": 8},
            {("linear", "module", False): 13}),
}


def build(name: str, device: str) -> nn.Module:
    import transformers

    config_class, model_class, sizes, _ = MODELS[name]
    with torch.device(device):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_a_site(name: str) -> None:
    model = build(name, "meta")
    captured = capture(model)
    assert captured.method == "trace", captured.notes
    sites = find(model, captured)
    assert Counter((site.kind, site.swap, site.transposed) for site in sites) == MODELS[name][3]
    assert all(site.uses > 0 for site in sites)
    named = {alias for site in sites for alias in (site.name, *site.aliases)}
    matrices = {path for path, p in model.named_parameters()
                if p.ndim >= 2 and min(p.shape) > 1 and not path.endswith("bias")
                and not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.Conv2d)}
    assert matrices - named <= {"embeddings.position_embeddings", "embeddings.cls_token"}  # added, not multiplied
    for site in sites:
        owner = model.get_submodule(site.owner)
        assert type(owner).__name__ == site.owner_class
        bias = getattr(owner, "bias", None) if site.kind == "linear" else None
        assert (site.bias is not None) == (bias is not None)


def test_real_and_meta_weights_give_the_same_sites() -> None:
    for name in ("Llama", "Qwen3-MoE", "GPT-2"):
        on_cpu, on_meta = (build(name, device) for device in ("cpu", "meta"))
        assert find(on_cpu, capture(on_cpu)) == find(on_meta, capture(on_meta))


@pytest.mark.parametrize("name", MODELS)
def test_routers_are_found_and_nothing_else_is_one(name: str) -> None:
    model = build(name, "meta")
    routers = {site.name for site in find(model, capture(model)) if site.role == "router"}
    leaf = {"Qwen3-MoE": "gate", "Mixtral": "gate", "OLMoE": "gate", "DeepSeek-V3": "gate", "GPT-OSS": "router"}
    assert routers == {path for path, _ in model.named_parameters()
                       if path.endswith(f".mlp.{leaf.get(name)}.weight")}
    assert bool(routers) == (name in leaf)


@pytest.mark.parametrize("chosen", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_the_same_sites_whatever_the_setting(chosen: str) -> None:
    model = build("Qwen3-MoE", "cpu")
    model.config._experts_implementation = chosen
    experts = [site for site in find(model, capture(model)) if site.kind == "experts"]
    assert [(site.name.rpartition(".")[2], site.shape) for site in experts[:2]] == [
        ("gate_up_proj", (4, 32, 32)), ("down_proj", (4, 32, 16))]
    assert [(site.out_features, site.in_features) for site in experts[:2]] == [(32, 32), (32, 16)]
    assert "RMSNorm" in (experts[0].produced_by or "") and experts[1].produced_by == "silu*mul"


def test_given_inputs_reach_what_dummy_inputs_do_not(tiny_model: Callable[..., nn.Module],
                                                     token_ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    assert find(model, capture(model, token_ids)) == find(model, capture(model, {"input_ids": token_ids}))


@pytest.mark.slow
@pytest.mark.parametrize(("config_class", "sizes", "counts"), [
    ("LlamaConfig",
     {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 8, "vocab_size": 128256}, {"embedding": 1, "linear": 225}),
    ("Qwen3MoeConfig",
     {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
      "num_key_value_heads": 4, "vocab_size": 151936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
      "moe_intermediate_size": 768}, {"embedding": 1, "linear": 241, "experts": 96}),
], ids=["Llama 8B", "Qwen3-MoE 30B"])
def test_large_models_on_meta(config_class: str, sizes: dict[str, int], counts: dict[str, int]) -> None:
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, config_class)(**sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    sites = find(model, capture(model))
    assert Counter(site.kind for site in sites) == counts
    assert sum(site.numel for site in sites) > 7.9e9
