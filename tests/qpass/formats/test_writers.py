"""Writers: GPTQ and AWQ there and back byte for byte, into each other with equal weights, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qpass
from qpass.cli import main
from qpass.errors import CheckpointError
from qpass.layers.packed_layers import PackedWeight
from tests.qpass.formats.fixture_folders import SMALL

AutoModelForCausalLM = pytest.importorskip("transformers", reason="Transformers is not installed").AutoModelForCausalLM
GPTQ = ("gptq/w4_g32_asym", "gptq/w4_g32_descact", "gptq/w3_g32")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.dequantize(torch.float32) for name, layer in model.named_modules()
            if isinstance(layer, PackedWeight)}


@pytest.mark.parametrize(("name", "to"), [*((name, "gptq") for name in GPTQ), ("awq/gptqmodel_gemm_g32", "awq"),
                                          ("compressed-tensors/w4a16_asym", "compressed-tensors"),
                                          ("modelopt/nvfp4", "modelopt")])
def test_there_and_back_is_byte_for_byte(name: str, to: str, tmp_path: Path) -> None:
    qpass.save(qpass.load(SMALL / name), tmp_path / "out", format=to)
    before, after = (load_file(folder / "model.safetensors") for folder in (SMALL / name, tmp_path / "out"))
    if to == "modelopt":  # the scales of activations that this machine keeps in float
        before = {key: tensor for key, tensor in before.items() if not key.endswith(".input_scale")}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert weights(qpass.load(tmp_path / "out")).keys() == weights(qpass.load(SMALL / name)).keys()


@pytest.mark.parametrize(("name", "to"), [
    ("gptq/w4_g32_asym", "awq"), ("awq/gptqmodel_gemm_g32", "gptq"), ("autoround/ar_w4_g32_asym", "compressed-tensors"),
    ("gptq/w4_g32_descact", "compressed-tensors"), ("gptq/w3_g32", "compressed-tensors"),
    ("compressed-tensors/w4a16_asym", "gptq"), ("compressed-tensors/w4a16_asym", "awq"),
    *((name, "gptq_v2") for name in GPTQ)])
def test_formats_hold_the_same_weights(name: str, to: str, tmp_path: Path) -> None:
    assert main(["convert", str(SMALL / name), str(tmp_path / "out"), "--to", to]) == 0
    one, other = qpass.load(SMALL / name), qpass.load(tmp_path / "out")
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(other(ids).logits, one(ids).logits, rtol=0, atol=0)


def quantized_but_keys(model: nn.Module, scheme: str) -> nn.Module:
    made: nn.Module = qpass.quantize(model, qpass.Recipe(scheme, overrides={"*.k_proj": None}), progress=False)
    return made


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bitsandbytes_there_and_back(scheme: str, family: str, tmp_path: Path, tiny_model: Any,
                                     token_ids: torch.Tensor) -> None:
    """With biases, and a layer that stays float."""
    model = quantized_but_keys(tiny_model(family, dtype=torch.bfloat16), scheme)
    qpass.save(model, tmp_path, format="bitsandbytes")
    again: Any = qpass.load(tmp_path)
    first, second = weights(model), weights(again)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with torch.inference_mode():
        assert torch.equal(again(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_bitsandbytes_reads_it(scheme: str, tmp_path: Path, tiny_model: Any) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model = quantized_but_keys(tiny_model("llama", dtype=torch.bfloat16), scheme)
    qpass.save(model, tmp_path, format="bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, weight in weights(model).items():
        held = theirs.get_submodule(key).weight
        assert torch.equal(functional.dequantize_4bit(held.data, held.quant_state), weight.bfloat16()), key
    assert type(theirs.model.layers[0].self_attn.k_proj) is type(theirs.lm_head) is nn.Linear


def test_version_2_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    source, out = SMALL / "gptq/w4_g32_asym", tmp_path / "out"
    qpass.save(qpass.load(source), out, format="gptq_v2")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    first, second = (load_file(folder / "model.safetensors") for folder in (source, out))
    name = "model.layers.0.self_attn.q_proj.qzeros"
    shifts = torch.arange(0, 32, 4)
    one, two = (file[name].unsqueeze(-1) >> shifts & 15 for file in (first, second))
    assert torch.equal((one + 1) & 15, two)
    assert all(torch.equal(first[key], second[key]) for key in first if not key.endswith("qzeros"))


def test_the_table_of_a_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(SMALL / "gptq" / "w4_g32_asym"), str(tmp_path / "out"), "--to", "awq"]) == 0
    said = capsys.readouterr().out
    assert "self_attn.q_proj" in said and "w4a16 g32 asym" in said and "GPTQ" in said and "AWQ" in said
    assert main(["convert", str(SMALL / "gptq" / "w4_g32_asym"), str(tmp_path / "out"), "--to", "awq"]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_activation_order_survives_a_state_dict(tmp_path: Path) -> None:
    model, other = (qpass.load(SMALL / "gptq" / "w4_g32_descact", dtype=torch.float32) for _ in range(2))
    state = model.state_dict()
    assert any(name.endswith(".weight_g_idx") for name in state)
    for layer in other.modules():
        if isinstance(layer, PackedWeight):
            layer.input_order.copy_(torch.arange(layer.spec.in_features, dtype=torch.int32))
    assert not all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(other).values(), strict=True))
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(other).values(), strict=True))
    with torch.inference_mode():
        ids = torch.arange(3, 12)[None]
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
        qpass.dequantize(other)
        torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "to", "said"), [
    ("gptq/w3_g32", "awq", "integers of 4 bits, not int3"), ("gptq/w4_g32_descact", "awq", "order nor a scale"),
    ("gptq/w3_g32", "no_such", "there are compressed-tensors, awq, gptq, gptq_v2, modelopt, bitsandbytes, gguf"),
    ("gptq/w4_g32_asym", "bitsandbytes", "written for nf4 and fp4, not int4"),
    ("gptq/w4_g32_asym", "modelopt", "written for nvfp4 whose scales are multiplied, not int")])
def test_what_a_format_cannot_hold_is_refused_by_layer(name: str, to: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        qpass.save(qpass.load(SMALL / name), tmp_path / "out", format=to)
    assert not (tmp_path / "out").exists()


def test_inspect_reads_no_tensor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qpass.formats.safetensors_folder.SafetensorsFolder.read",
                        lambda *a: pytest.fail("a tensor was read"))
    for folder in sorted(SMALL.glob("*/*")):
        if folder.parent.name in ("gptq", "awq", "autoround", "compressed-tensors"):
            found = qpass.inspect(folder)
            assert len(found.layers) == 7 and found.format and all(" g" in layer.numbers for layer in found.layers)
    assert main(["inspect", str(SMALL / "gptq" / "w3_g32")]) == 0
    said = capsys.readouterr().out
    assert "GPTQ" in said and "w3a16 g32" in said and "linear_" in said and "quantized layers take" in said
