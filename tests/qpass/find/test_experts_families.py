"""Experts of real model classes at small sizes: every expert parameter is found, quantized, computed and saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.layers.experts_layer import QuantExperts

transformers = pytest.importorskip("transformers")
_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
          "num_experts_per_tok": 2, "tie_word_embeddings": False, "pad_token_id": 0}
_LOCAL, _SMALL = {"num_local_experts": 4}, {"moe_intermediate_size": 32}
_SHARED = {"num_experts": 4, **_SMALL, "shared_expert_intermediate_size": 32}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "num_key_value_heads": 4}
# family: (config class, model class, fields, what its experts' Gate reads)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", _LOCAL, "silu*up"),
    "Qwen2-MoE": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_SHARED, "decoder_sparse_step": 1}, "silu*up"),
    "Qwen3-MoE": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, **_SMALL}, "silu*up"),
    "DeepSeek-V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM",
                    {**_LATENT, **_SMALL, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
                     "first_k_dense_replace": 0}, "silu*up"),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", _LOCAL,
                "silu(alpha=1.702,limit=7.0)*up(limit=7.0,shift=1.0)"),
    "OLMoE": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 4}, "silu*up"),
    "Granite-MoE": ("GraniteMoeConfig", "GraniteMoeForCausalLM", _LOCAL, "silu*up"),
    "Llama-4": ("Llama4TextConfig", "Llama4ForCausalLM",
                {**_LOCAL, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}, "silu*up"),
    "Phi-MoE": ("PhimoeConfig", "PhimoeForCausalLM", _LOCAL, "silu*up"),
    "GLM-4-MoE": ("Glm4MoeConfig", "Glm4MoeForCausalLM",
                  {**_SMALL, "n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
                  "silu*up"),
    "Qwen3-Next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_SHARED, "layer_types": ["full_attention"]},
                   "silu*up"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.arange(14).view(2, 7) * 4 % 64


def build(family: str) -> nn.Module:
    config_class, model_class, fields, _ = FAMILIES[family]
    if not hasattr(transformers, model_class):
        pytest.skip(f"this version of transformers has no {model_class}")
    torch.manual_seed(3)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**_SIZES, **fields}))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 3:
            parameter.normal_(0, 0.3)
    return model.eval()


def expert_parameters(model: nn.Module) -> dict[str, int]:
    """Names and sizes of the stacks of weights, by what they are: matrices, one an expert."""
    return {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3 and "conv" not in name}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@every_family
def test_every_expert_parameter_is_found_and_quantized(
        family: str, record_property: Callable[[str, object], None]) -> None:
    model = build(family)
    wanted = expert_parameters(model)
    assert wanted
    plan = qpass.plan(model, "w8a16")
    rows = {row.name: row for row in plan.rows}
    assert {name for name, row in rows.items() if row.kind == "experts" and row.status == "quantize"} == set(wanted)
    assert all(row.status == "quantize" or row.reason or row.rule != "recipe w8a16" for row in plan.rows)
    named = {name for row in plan.rows for name in (row.name,)}
    assert all(name in named or p.ndim < 2 or min(p.shape) < 2 or "bias" in name
               for name, p in model.named_parameters() if "conv" not in name)
    qpass.quantize(model, "w8a16", progress=False)
    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    assert experts and not expert_parameters(model)
    assert {str(module.site.gate) for module in experts} == {FAMILIES[family][3]}
    report = [row for row in qpass.explain(model).rows if row.kind == "experts"]
    assert {row.name for row in report if row.status == "quantized"} == set(wanted)
    assert sum(row.bytes_after for row in report) == sum(module.nbytes for module in experts)
    record_property("experts", f"{family:<12} {len(wanted)} parameters, {sum(wanted.values()):>8,} numbers found; "
                    f"{len(report)} parameters, {sum(wanted[row.name] for row in report):>8,} quantized")


@every_family
def test_the_result_is_that_of_the_dequantized_model(family: str) -> None:
    model = build(family)
    before = logits(model)
    qpass.quantize(model, qpass.Recipe(None, overrides={"experts": "w8a16"}), progress=False)
    got = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled), got, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    qpass.dequantize(model)
    want = logits(model)
    assert not any(isinstance(module, QuantExperts) for module in model.modules())
    spread = float(want.abs().max())
    assert torch.allclose(got, want, rtol=1e-3, atol=2e-3 * spread)
    assert 0 < float((want - before).abs().max()) < 0.1 * spread


@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss", "Llama-4"])
def test_the_state_dict_names_each_expert_and_loads_back(family: str, tmp_path: Path) -> None:
    model = build(family)
    recipe = qpass.Recipe("w4a8", overrides={"*.down_proj[1]": "w8a8", "*.down_proj[2]": None})
    qpass.quantize(model, recipe, progress=False)
    got, state = logits(model), model.state_dict()
    keys = {key.rpartition(".experts.")[2] for key in state if ".experts." in key}
    assert {"3.gate_proj.weight_packed", "0.up_proj.weight_scale", "1.down_proj.weight", "1.down_proj.weight_scale",
            "2.down_proj.weight"} <= keys and "2.down_proj.weight_scale" not in keys
    experts = next(module for module in model.modules() if isinstance(module, QuantExperts))
    assert all((state_key := next(key for key in state if key.endswith(".experts." + name))) and
               (state[state_key].dtype, tuple(state[state_key].shape)) == told
               for name, told in experts.on_disk.items())
    fresh = build(family)
    qpass.quantize(fresh, recipe, progress=False)
    for parameter in fresh.parameters():
        parameter.zero_()
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), got)
    with pytest.raises(RuntimeError, match=r"experts\.2\.down_proj\.weight"):
        fresh.load_state_dict({key: value for key, value in state.items() if ".2.down_proj" not in key})
    qpass.save(model, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    path = next(name for name, module in model.named_modules() if module is experts)
    matched = [t for t in targets if t.startswith("re:") and re.match(t[3:], f"{path}.1.down_proj")]
    assert len(matched) == 1 and not re.match(matched[0][3:], f"{path}.2.down_proj")


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss", "Llama-4"])
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    model = build(family)
    recipe = qpass.Recipe("w4a8", overrides={"*.down_proj[1]": "w8a8", "*.down_proj[2]": None})
    qpass.quantize(model, recipe, progress=False)
    qpass.save(model, tmp_path / "one")
    again = qpass.load(tmp_path / "one")
    assert torch.equal(logits(again), logits(model)) and not expert_parameters(again)
    qpass.save(again, tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_rows_show_bytes_kernel_and_routers() -> None:
    text = str(qpass.plan(build("Qwen2-MoE"), "w4a8"))
    assert "mlp.experts.gate_up_proj" in text and "4x64x32" in text and "experts_" in text
    assert "a router: its result picks experts" in text
