"""Transformers: config, save_pretrained, generate, hooks and other tools' readers, on real classes and tiny sizes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qpass
from qpass.errors import AlreadyQuantized, CheckpointError, PackedForInference, QPassError
from qpass.layers.packed_layers import PackedWeight

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

Build = Callable[..., Any]


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "tied_llama", "gpt2", "opt", "qwen3_moe"])
def test_save_and_load_without_the_model(tmp_path: Path, tiny_model: Build, token_ids: torch.Tensor,
                                         family: str) -> None:
    model = qpass.quantize(tiny_model(family), "w4a8", progress=False)
    model.generation_config.max_new_tokens = 7
    qpass.save(model, tmp_path / "out")
    loaded = qpass.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    assert loaded.config.to_dict()["quantization_config"] == model.config.to_dict()["quantization_config"]
    assert loaded.generation_config.max_new_tokens == 7
    assert qpass.explain(loaded).rows == qpass.explain(model).rows
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    if model.config.tie_word_embeddings:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_save_pretrained_loads_here_and_with_compressed_tensors(tmp_path: Path, tiny_llama: Build,
                                                                token_ids: torch.Tensor) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = qpass.quantize(tiny_llama(), qpass.Recipe("w4a16", overrides={"*.down_proj": "w8a16"}), progress=False)
    model.save_pretrained(tmp_path / "theirs")
    qpass.save(model, tmp_path / "ours")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (read(tmp_path / "theirs" / "config.json")["quantization_config"]
            == read(tmp_path / "ours" / "config.json")["quantization_config"])
    loaded = qpass.load(tmp_path / "theirs")
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", quantization_config=transformers.CompressedTensorsConfig())
    torch.testing.assert_close(other(token_ids).logits, model(token_ids).logits, rtol=1e-4, atol=1e-5)
    for name, layer in packed_layers(model).items():  # the first forward decompressed them
        assert torch.equal(other.get_submodule(name).weight.float(), layer.dequantize(torch.float32)), name


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a16_asym"])
def test_every_scheme_is_read_by_compressed_tensors(tmp_path: Path, tiny_llama: Build, scheme: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = qpass.quantize(tiny_llama(hidden_size=128, num_attention_heads=4, torch_dtype=None), scheme, progress=False)
    qpass.save(model, tmp_path / "out")
    config = transformers.CompressedTensorsConfig(dequantize=True)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)
    layers = packed_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(other.get_submodule(name).weight.float(), layer.dequantize(torch.float32)), name


def test_config_tells_and_forgets(tiny_llama: Build) -> None:
    model = tiny_llama()
    assert not hasattr(model.config, "quantization_config")
    qpass.quantize(model, "w8a8", progress=False)
    config = model.config.quantization_config
    assert (config["quant_method"], config["format"], config["ignore"]) == ("compressed-tensors", "int-quantized",
                                                                            ["lm_head"])
    qpass.dequantize(model)
    assert not hasattr(model.config, "quantization_config")
    assert not packed_layers(model) and model.train().training


def test_generate_eager_copied_and_compiled(tiny_llama: Build, token_ids: torch.Tensor) -> None:
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    how = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(token_ids, **how)
    assert expected.shape == (2, 15)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model).generate(token_ids, **how), expected)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(token_ids, **how), expected)


def test_one_graph_and_no_recompile_for_new_lengths(tiny_llama: Build) -> None:
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 17):
        ids = torch.arange(3, 3 + length)[None]
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_train_is_refused_before_any_flag_changes(tiny_llama: Build, token_ids: torch.Tensor) -> None:
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    expected = model(token_ids).logits
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(PackedForInference, match=r"cannot train: 14 of its layers .*qpass\.dequantize"):
            one.train()
        assert not any(module.training for module in one.modules())
        assert one.eval() is one
        assert torch.equal(one(token_ids).logits, expected)
    model.model.layers[0].train()  # a part of the model says nothing of what is to learn
    assert not any(module.training for module in packed_layers(model).values())
    assert not any(module.training for module in model.eval().modules())


def test_scales_that_layers_share_are_saved_by_transformers(tiny_llama: Build, token_ids: torch.Tensor,
                                                            tmp_path: Path) -> None:
    model = qpass.quantize(tiny_llama(), "w8a8_static", calibration=[{"input_ids": token_ids}], progress=False)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_scale is attention.k_proj.input_scale
    model.save_pretrained(tmp_path)
    assert torch.equal(qpass.load(tmp_path)(token_ids).logits, model(token_ids).logits)


def test_hooks_stay(tiny_llama: Build, token_ids: torch.Tensor) -> None:
    model = tiny_llama()
    seen: list[tuple[int, ...]] = []
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    qpass.quantize(model, "w4a8", progress=False)
    replaced = model.model.layers[0].mlp.down_proj
    assert any(isinstance(module, PackedWeight) for module in replaced.modules())
    model(token_ids)
    assert seen[-1] == (2, 9, 64)
    assert not replaced(torch.ones(1, 128)).any()
    seen.clear()
    handle.remove()
    model(token_ids)
    assert not seen


def test_methods_of_the_model_still_work(tiny_llama: Build, token_ids: torch.Tensor) -> None:
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    expected = model(token_ids).logits
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    model.requires_grad_(False)
    assert not any(p.requires_grad for _, p in model.named_parameters())
    assert torch.equal(model.to("cpu")(token_ids).logits, expected)
    assert torch.equal(model.cpu().float()(token_ids).logits, expected)
    assert model.bfloat16()(token_ids).logits.dtype == torch.bfloat16
    state = qpass.quantize(tiny_llama(), "w4a8", progress=False).state_dict()
    other = qpass.quantize(tiny_llama(initializer_range=0.1), "w4a8", progress=False)
    assert not torch.equal(other(token_ids).logits, expected)
    other.load_state_dict(state)
    assert torch.equal(other(token_ids).logits, expected)
    with pytest.raises(AlreadyQuantized):
        qpass.quantize(model, "w4a8", progress=False)


def test_load_a_float_folder(tmp_path: Path, tiny_llama: Build, token_ids: torch.Tensor) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "float")
    assert torch.equal(qpass.load(tmp_path / "float")(token_ids).logits, model(token_ids).logits)
    loaded = qpass.load(tmp_path / "float", "w4a8")
    qpass.quantize(model, "w4a8", progress=False)
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    file = tmp_path / "float" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="truncated"):
        qpass.load(tmp_path / "float", "w4a8")


def test_code_from_a_checkpoint_never_runs(tmp_path: Path, tiny_llama: Build) -> None:
    qpass.save(qpass.quantize(tiny_llama(), "w4a8", progress=False), tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    config.update(architectures=["EvilModel"], model_type="evil",
                  auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match=r"EvilModel.*code from checkpoints is never run"):
        qpass.load(tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_the_tokenizer_is_saved_with_the_model(tmp_path: Path, tiny_llama: Build) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    qpass.save(qpass.quantize(tiny_llama(), "w4a8", progress=False), tmp_path / "out", tokenizer=Tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def _fixtures() -> list[Path]:
    given = os.environ.get("QPASS_FIXTURES")
    root = Path(given) if given else Path(__file__).resolve().parents[4] / "shared" / "fixtures"
    folder = root / "compressed-tensors"
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


READABLE = ("w4a16", "w8a8", "w4a8", "w4a16_asym", "w4a16_channel", "w8a16", "w2a16")


@pytest.mark.parametrize("name", READABLE)
def test_checkpoints_of_llm_compressor(name: str) -> None:
    folder = next((path for path in _fixtures() if path.name == name), None)
    if folder is None:
        pytest.skip("no checkpoints of LLM Compressor beside the repository; QPASS_FIXTURES names their folder")
    reference = load_file(folder / "reference.safetensors")
    model = qpass.load(folder)
    layers = packed_layers(model)
    assert {f"{name}.weight" for name in layers} == {key for key in reference if not key.startswith("__")}
    for path, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.float32), reference[f"{path}.weight"]), path
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    logits = model.float()(reference["__input_ids__"]).logits
    assert (logits - reference["__logits__"]).abs().max() < 0.05 * reference["__logits__"].abs().max()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_models_of_experts_are_saved_with_their_routers_float(tmp_path: Path, tiny_model: Build, family: str,
                                                             token_ids: torch.Tensor) -> None:
    model = tiny_model(family)
    routers = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".mlp.gate.weight")}
    qpass.quantize(model, qpass.Recipe("w8a16", overrides={"experts": None}), progress=False)
    qpass.save(model, tmp_path / "one")
    again = qpass.load(tmp_path / "one")
    for name, router in routers.items():
        assert torch.equal(model.get_parameter(name), router) and torch.equal(again.get_parameter(name), router)
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    # Other readers may have an nn.Linear there, which the target "Linear" would find.
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in routers} <= set(config["ignore"])
    qpass.save(again, tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_explain_says_who_loaded_the_model(tiny_llama: Build) -> None:
    model = tiny_llama()
    with pytest.raises(QPassError, match=r"not quantized by qpass.*qpass\.plan"):
        qpass.explain(model)
    model.config.quantization_config = transformers.BitsAndBytesConfig()
    with pytest.raises(QPassError, match=r"BitsAndBytesConfig.*qpass\.QPassConfig\(\)"):
        qpass.explain(model)
