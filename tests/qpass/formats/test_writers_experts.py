"""Writers of experts: mixtures saved as GPTQ, AWQ and GGUF, a layer or a stack for each projection, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qpass
from qpass.errors import CheckpointError
from qpass.formats.gguf_file import read_gguf
from qpass.layers.experts_layer import QuantExperts

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
IDS = torch.arange(3, 19)[None]
EXPERTS = "model.layers.0.mlp.experts"


def mixture(scheme: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 3,
        "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 32, "vocab_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "max_position_embeddings": 64, "norm_topk_prob": True, **sizes})
    model = transformers.Qwen3MoeForCausalLM(config).half().eval()
    return qpass.quantize(model, scheme, progress=False)


def preset(name: str) -> Any:
    return qpass.PRESETS[name].with_group_size(32)


def same_experts(one: Any, other: Any) -> None:
    first, second = (model.get_submodule(EXPERTS) for model in (one, other))
    assert isinstance(first, QuantExperts) and isinstance(second, QuantExperts)
    for which in (0, 1):
        for expert in range(3):
            assert torch.equal(first.dequantize(which, expert, torch.float32),
                               second.dequantize(which, expert, torch.float32))


@pytest.mark.parametrize(("scheme", "to"), [("w4a16", "gptq"), ("w4a16_asym", "gptq_v2"), ("w4a16_asym", "awq"),
                                            ("w8a16", "gptq")])
def test_a_layer_for_each_projection_of_an_expert(scheme: str, to: str, tmp_path: Path) -> None:
    model = mixture(preset(scheme))
    qpass.save(model, tmp_path, format=to)
    stored = load_file(tmp_path / "model.safetensors")
    assert {f"{EXPERTS}.{expert}.{name}.qweight" for expert in range(3)
            for name in ("gate_proj", "up_proj", "down_proj")} <= set(stored)
    assert not any("gate_up" in name for name in stored)
    same_experts(qpass.load(tmp_path), model)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == to.removesuffix("_v2")


def test_what_is_no_integers_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj: GPTQ holds integers"):
        qpass.save(mixture("fp8_dynamic"), tmp_path / "out", format="gptq")
    some = qpass.Recipe(preset("w4a16"), ignore=("lm_head", f"{EXPERTS}.down_proj"), overrides={})
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj: it is not integers of its own"):
        qpass.save(mixture(some), tmp_path / "out", format="gptq")


@pytest.mark.parametrize(("scheme", "kind"), [("w4a16", "Q4_0"), ("w4a8", "Q4_0"), ("w8a16", "Q8_0"),
                                              ("w4a16_asym", "Q4_1"), ("nvfp4a16", "F16")])
def test_a_stack_for_each_projection_in_gguf(scheme: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = mixture(scheme if scheme == "nvfp4a16" else preset(scheme))
    file = read_gguf(path := qpass.save(model, tmp_path / "m.gguf", format="gguf"))
    for name, shape in (("gate", (3, 32, 64)), ("up", (3, 32, 64)), ("down", (3, 64, 32))):
        assert (file.tensors[f"blk.0.ffn_{name}_exps.weight"].kind, file.tensors[
            f"blk.0.ffn_{name}_exps.weight"].shape) == (kind, shape)
    assert file.metadata["qwen3moe.expert_count"] == 3 and file.metadata["qwen3moe.expert_used_count"] == 2
    assert file.metadata["qwen3moe.expert_feed_forward_length"] == 32
    loaded = qpass.load(path, dtype=torch.float32)
    if kind in ("Q4_0", "Q8_0"):
        same_experts(loaded, model)
    with torch.inference_mode():
        expected = qpass.dequantize(model).float()(IDS).logits
        torch.testing.assert_close(loaded(IDS).logits.float(), expected, rtol=0, atol=0.02 * float(
            expected.abs().max()))


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match="norm_topk_prob is False, and every GGUF of 'qwen3moe' means True"):
        qpass.save(mixture(preset("w4a16"), norm_topk_prob=False), tmp_path / "m.gguf", format="gguf")
    assert not list(tmp_path.iterdir())
