"""GGUF files whose experts lie otherwise than the model's: gate and up apart in the file, row by row in the model, with
biases and attention sinks, as llama.cpp's converter writes gpt-oss; and what rotary embeddings a file asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qpass
from qpass.formats.gguf_file import read_gguf
from qpass.formats.gguf_rope import set_rope
from qpass.layers.experts_layer import QuantExperts

transformers = pytest.importorskip("transformers")
gguf: Any = pytest.importorskip("gguf")
E, H, I = 4, 64, 32  # noqa: E741  (2 * I == H: no shape tells which way a matrix lies)
IDS = torch.arange(3, 35)[None]


def small() -> Any:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=64, max_position_embeddings=128,
        sliding_window=8, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
                         "beta_slow": 1.0, "truncate": False, "rope_theta": 10000.0})
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and sinks too
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim < 3 else 0.1))
    return model


def write(path: Path, model: Any, kind: str) -> None:
    """As convert_hf_to_gguf.py does it; `kind` is the type of the experts, whose rounding the model gets back."""
    config, number = model.config, getattr(gguf.GGMLQuantizationType, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(I)
    writer.add_expert_feed_forward_length(I)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_expert_count(E)
    writer.add_expert_used_count(2)
    writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)
    writer.add_vocab_size(config.vocab_size)

    def stack(name: str, rows: Tensor) -> None:
        blocks = gguf.quantize(rows.detach().contiguous().numpy(), number)
        writer.add_tensor(f"{names.get_name(name)}.weight", blocks, raw_dtype=number)
        rows.data.copy_(torch.from_numpy(gguf.dequantize(blocks, number)))

    for name, p in model.named_parameters():
        path_of, _, leaf = name.rpartition(".")
        if leaf == "sinks":
            writer.add_tensor(f"{names.get_name(name)}.weight", p.detach().numpy())
        elif leaf == "gate_up_proj":
            stack(f"{path_of}.gate_proj", p[..., ::2].transpose(1, 2))
            stack(f"{path_of}.up_proj", p[..., 1::2].transpose(1, 2))
        elif leaf == "down_proj":
            stack(f"{path_of}.down_proj", p.transpose(1, 2))
        elif leaf == "gate_up_proj_bias":
            for at, part in enumerate(("gate_proj", "up_proj")):
                writer.add_tensor(f"{names.get_name(f'{path_of}.{part}')}.bias", p[..., at::2].detach().numpy().copy())
        elif leaf == "down_proj_bias":
            writer.add_tensor(f"{names.get_name(f'{path_of}.down_proj')}.bias", p.detach().numpy())
        else:
            writer.add_tensor(f"{names.get_name(path_of)}.{leaf}", p.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["MXFP4", "F16"])
def test_experts_row_by_row_with_biases_and_sinks(kind: str, tmp_path: Path) -> None:
    model = small()
    write(tmp_path / "m.gguf", model, kind)
    loaded: Any = qpass.load(tmp_path / "m.gguf", dtype=torch.float32)
    experts = loaded.model.layers[1].mlp.experts
    if kind == "F16":
        assert torch.equal(experts.gate_up_proj, model.model.layers[1].mlp.experts.gate_up_proj)
    else:
        assert isinstance(experts, QuantExperts)
        assert experts.blocks[0].spec.up.weight.type == "mxfp4"
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert loaded.config.sliding_window == 8 and loaded.config.head_dim == 16
    if kind == "MXFP4":
        qpass.save(loaded, tmp_path / "saved")
        again = qpass.load(tmp_path / "saved")
        with torch.inference_mode():
            assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def rope_of(path: Path, before: dict[str, Any], said: dict[str, Any], factors: Tensor | None) -> dict[str, Any]:
    """The rope_parameters of a config that had `before`, once a file with `said` and `factors` was read."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_freq_base(500000.0)
    for key, value in said.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.rope.scaling.{key}", value)
    writer.add_tensor("rope_freqs.weight" if factors is not None else "output_norm.weight",
                      (torch.ones(4) if factors is None else factors).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=before)
    set_rope(config, read_gguf(path), "llama")
    return config.rope_parameters  # type: ignore[no-any-return]


def test_llama_3_is_told_by_its_factors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    asked = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=asked)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(32) / 32)
    default = {"rope_type": "default", "rope_theta": 1.0}
    assert rope_of(tmp_path / "a.gguf", default, {}, plain / theirs) == asked
    assert rope_of(tmp_path / "b.gguf", default, {}, torch.ones(32))["rope_type"] == "default"
    with pytest.raises(qpass.errors.CheckpointError, match="up to 8"):
        rope_of(tmp_path / "c.gguf", default, {}, torch.linspace(1, 8, 32))


def test_linear_and_yarn_stand_in_the_metadata(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1.0, "factor": 32.0, "truncate": False}
    said = {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0}
    assert rope_of(tmp_path / "a.gguf", yarn, said, None) == {**yarn, "rope_theta": 500000.0, "factor": 4.0,
                                                             "beta_fast": 16.0}
    assert rope_of(tmp_path / "b.gguf", yarn, {"type": "linear", "factor": 2.0}, None) == {
        "rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}
    assert rope_of(tmp_path / "c.gguf", yarn, {}, None) == {"rope_type": "default", "rope_theta": 500000.0}
    part = {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.25}
    assert rope_of(tmp_path / "e.gguf", part, {}, None) == {**part, "rope_theta": 500000.0}
    with pytest.raises(qpass.errors.CheckpointError, match=r"yarn_log_multiplier is 0\.125"):
        rope_of(tmp_path / "d.gguf", yarn, {**said, "yarn_log_multiplier": 0.125}, None)
