"""QuantizedCache: models generate with it as with a float cache, compiled too; it holds half the bytes, or fewer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qpass
from qpass.errors import CheckpointError, QPassError, RecipeError

Build = Callable[..., Any]
KINDS = {"int8": {}, "int8 per head": {"granularity": "per_head"}, "fp8": {"kind": "fp8"},
         "fp8 per tensor": {"kind": "fp8", "granularity": "per_tensor"}, "int4": {"kind": "int4", "group_size": 16}}


def steps(model: Any, ids: torch.Tensor, cache: Any, prompt: int) -> torch.Tensor:
    """Logits of a prompt, a chunk, and then one token after the other."""
    with torch.no_grad():
        out = [model(ids[:, :prompt], past_key_values=cache).logits,
               model(ids[:, prompt:prompt + 4], past_key_values=cache).logits]
        out += [model(ids[:, i:i + 1], past_key_values=cache).logits for i in range(prompt + 4, ids.shape[1])]
    return torch.cat(out, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_logits_are_those_of_a_float_cache(kind: str, static: bool, tiny_llama: Build) -> None:
    model = tiny_llama(max_position_embeddings=512)
    ids = torch.randint(3, 128, (2, 41))
    with torch.no_grad():
        expected = model(ids).logits
    cache = qpass.QuantizedCache(model, **{"kind": "int8", **KINDS[kind]}, max_cache_len=64 if static else None)
    found = steps(model, ids, cache, 19)
    allowed = {"int8": 0.02, "fp8": 0.08, "int4": 0.3}[kind.split()[0]]
    difference = (found - expected).abs().max() / expected.abs().max()
    assert 0 < difference < allowed
    assert cache.get_seq_length() == 41
    decoded = steps(model, ids, _as_decoded(model, kind, static), 19)  # whatever the attention, the same numbers
    assert (decoded - found).abs().max() < 1e-4 * expected.abs().max()


def _as_decoded(model: Any, kind: str, static: bool) -> Any:
    model.set_attn_implementation("sdpa")
    return qpass.QuantizedCache(model.config, **{"kind": "int8", **KINDS[kind]}, max_cache_len=64 if static else None)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_sliding_windows_and_padding(static: bool, tiny_model: Build) -> None:
    model = tiny_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1,
                       layer_types=["full_attention", "sliding_attention"])
    ids = torch.randint(3, 128, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    asked: Any = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True,
                  "output_logits": True, "pad_token_id": 0}
    expected = model.generate(ids, **asked)
    cache = qpass.QuantizedCache(model, max_cache_len=64 if static else None)
    found = model.generate(ids, **asked, past_key_values=cache)
    same = (expected.sequences == found.sequences).all(0).long().cumprod(0).sum() - ids.shape[1]
    assert same >= 1
    for one, other in list(zip(expected.logits, found.logits, strict=False))[:int(same)]:
        assert (one - other).abs().max() < 0.03 * one.abs().max()
    if not static:
        assert cache.layers[1].length < 12 and cache.layers[0].length == 49


def test_beams_and_crop(tiny_llama: Build) -> None:
    model = tiny_llama(max_position_embeddings=512)
    ids = torch.randint(3, 128, (1, 12))
    cache = qpass.QuantizedCache(model)
    out = model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False, past_key_values=cache, pad_token_id=0)
    assert out.shape[1] <= 20
    cache = qpass.QuantizedCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first = model(ids[:, :3], past_key_values=cache).logits
        cache.crop(-3)
        assert torch.equal(model(ids[:, :3], past_key_values=cache).logits, first)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_transformers_that_describes_all_layers_at_once(tiny_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    types = ["full_attention", "sliding_attention"]
    monkeypatch.setattr("qpass.hf.cache.get_layer_types_and_kwargs", lambda config: (types, {"sliding_window": 8}))
    cache = qpass.QuantizedCache(tiny_llama())
    assert [layer.is_sliding for layer in cache.layers] == [False, True]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_what_generation_does_to_a_cache(static: bool, tiny_llama: Build) -> None:
    """Rows in another order or repeated, tokens forgotten, layers moved away and back: as if it never had been."""
    model = tiny_llama(max_position_embeddings=512)
    ids = torch.randint(3, 128, (3, 20))
    order = torch.tensor([2, 0, 0])

    def filled(rows: torch.Tensor) -> Any:
        cache = qpass.QuantizedCache(model, max_cache_len=32 if static else None)
        model(rows[:, :16], past_key_values=cache)
        return cache

    def after(cache: Any, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(rows[:, 16:], past_key_values=cache).logits
        return logits

    with torch.no_grad():
        want, cache = after(filled(ids[order]), ids[order]), filled(ids)
        cache.reorder_cache(order)
        torch.testing.assert_close(after(cache, ids[order]), want)
        cache = filled(ids)
        cache.batch_select_indices(order)
        torch.testing.assert_close(after(cache, ids[order]), want)
        cache = filled(ids[:1])
        cache.batch_repeat_interleave(3)
        thrice = ids[:1].repeat(3, 1)
        torch.testing.assert_close(after(cache, thrice), after(filled(thrice), thrice))
        cache = filled(ids)
        first = after(cache, ids)
        cache.crop(-4)
        assert int(cache.get_seq_length()) == 16 and torch.equal(after(cache, ids), first)
        cache = filled(ids)
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        assert torch.equal(after(cache, ids), first)


def test_bytes(tiny_llama: Build) -> None:
    model = tiny_llama(torch.bfloat16, head_dim=64, num_hidden_layers=1, max_position_embeddings=2048)
    for kind, share in (("int8", 0.52), ("fp8", 0.52), ("int4", 0.29)):
        cache = qpass.QuantizedCache(model, kind, max_cache_len=1024)
        with torch.no_grad():
            model(torch.randint(3, 128, (2, 9)), past_key_values=cache)
        assert cache.nbytes <= share * 2 * 2 * 2 * 64 * 1024 * 2, kind
        assert str(cache.nbytes) in repr(cache)


@pytest.mark.parametrize("granularity", ["per_token", pytest.param("per_head", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(granularity: str, tiny_llama: Build) -> None:
    model = tiny_llama(num_hidden_layers=1)
    ids = torch.randint(3, 128, (1, 20))
    cache = qpass.QuantizedCache(model, granularity=granularity, max_cache_len=32)
    expected = steps(model, ids, cache, 16)
    cache = qpass.QuantizedCache(model, granularity=granularity, max_cache_len=32)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        model(ids[:, :16], past_key_values=cache)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = [compiled(ids[:, i:i + 1], past_key_values=cache).logits for i in range(16, 20)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert (torch.cat(found, 1) - expected[:, 16:]).abs().max() < 0.02 * expected.abs().max()


def test_scales_of_checkpoints(tmp_path: Path, tiny_llama: Build) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no kv_cache_scheme"):
        qpass.QuantizedCache.from_checkpoint(model, tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        for which, value in (("k", 0.01 + layer), ("v", 0.02 + layer)):
            tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor([value], dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}, "ignore": [],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cache = qpass.QuantizedCache.from_checkpoint(model, tmp_path)
    ids = torch.randint(3, 128, (1, 5))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    layer = cache.layers[1]
    assert str(layer.numbers) == "fp8 per_tensor"
    assert [float(scale) for scale in layer.scales] == [float(torch.tensor(v).bfloat16()) for v in (1.01, 1.02)]
    config["quantization_config"]["kv_cache_scheme"]["num_bits"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="symmetric int8"):
        qpass.QuantizedCache.from_checkpoint(model, tmp_path)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_head"])
def test_static_scales_are_those_of_the_first_tokens_after_a_reset(granularity: str, tiny_llama: Build) -> None:
    config = tiny_llama().config
    cache = qpass.QuantizedCache(config, "int8", granularity=granularity, max_cache_len=16)
    layer, large = cache.layers[0], torch.randn(1, config.num_key_value_heads, 4, 16)
    for states in (large * 1e-3, large):
        cache.reset()
        layer.update(states, states)
        held = [tensor.data_ptr() for tensor in layer.scales]
        keys, _ = layer.update(states[:, :, :1] * 50, states[:, :, :1])
        torch.testing.assert_close(keys[:, :, :4], states, rtol=0, atol=float(states.abs().max()) / 127)
        assert held == [tensor.data_ptr() for tensor in layer.scales]
        assert float(keys[:, :, 4].abs().max()) <= float(states.abs().max()) * 1.001  # they do not follow later ones


def test_what_cannot_be_is_said(tiny_llama: Build) -> None:
    model = tiny_llama()
    with pytest.raises(RecipeError, match="int3"):
        qpass.QuantizedCache(model, "int3")
    with pytest.raises(QPassError, match="computes its own"):
        qpass.QuantizedCache(model, scales={})
    with pytest.raises(QPassError, match="missing for layer 0"):
        qpass.QuantizedCache(model, granularity="per_head", scales={})
    with torch.no_grad(), pytest.raises(RecipeError, match=re.escape("heads of 16 numbers")):
        model(torch.ones(1, 4, dtype=torch.long), past_key_values=qpass.QuantizedCache(model, "int4"))
