"""from_pretrained with a QPassConfig: equal to loading and then quantizing, for every way that weights come in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qpass
from qpass.errors import RecipeError, WeightError
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedLayer

Build = Callable[..., torch.nn.Module]
load: Any = AutoModelForCausalLM.from_pretrained


def same(one: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


CASES = {
    "llama w4a8": ("llama", "w4a8", {}),
    "head tied, float": ("tied_llama", "w8a8", {}),
    "head tied, packed": ("tied_llama", "w4a8", {"ignore": [], "overrides": {"lm_head": "w8a16"}}),
    "biases and a transposed Conv1D": ("gpt2", "w8a16", {"overrides": {"*c_fc": None}}),
    "biases": ("opt", "w4a16_asym", {}),
    "experts": ("mixtral", "w8a16", {}),
    "experts of two kinds of norm": ("qwen3_moe", "w4a8", {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_loading_and_then_quantizing(case: str, tmp_path: Path, tiny_model: Build,
                                              token_ids: torch.Tensor) -> None:
    family, scheme, settings = CASES[case]
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    online = load(tmp_path, quantization_config=qpass.QPassConfig(scheme, **settings))
    later = qpass.quantize(load(tmp_path), qpass.Recipe(scheme, **settings), progress=False)
    same(online, later, token_ids)
    assert online.is_quantized
    assert str(qpass.explain(online)) == str(qpass.explain(later))
    assert not [name for name, p in online.named_parameters() if p.is_meta]
    if case == "experts":
        assert any(isinstance(module, QuantExperts) for module in online.modules())
    online.save_pretrained(tmp_path / "saved")
    same(qpass.load(tmp_path / "saved"), online, token_ids)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32])
def test_dtype_and_device_map(dtype: Any, tmp_path: Path, tiny_llama: Build, token_ids: torch.Tensor) -> None:
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path)
    online = load(tmp_path, quantization_config=qpass.QPassConfig("w4a8"), dtype=dtype, device_map="auto")
    later = qpass.quantize(load(tmp_path, dtype=dtype), "w4a8", progress=False)
    same(online, later, token_ids)
    assert online.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    with pytest.raises(RecipeError, match="device_map puts layers on the disk"):
        load(tmp_path, quantization_config=qpass.QPassConfig("w4a8"), offload_folder=tmp_path / "o",
             device_map={"model": "cpu", "lm_head": "disk"})


def test_what_cannot_be_is_said(tmp_path: Path, tiny_llama: Build) -> None:
    with pytest.raises(RecipeError, match="gptq needs data"):
        qpass.QPassConfig("w4a16", algorithms=["gptq"])
    with pytest.raises(RecipeError, match="no setting 'bitz'"):
        qpass.QPassConfig("w4a16", bitz=4)
    with pytest.raises(RecipeError, match="no scheme is named"):
        qpass.QPassConfig("w4a9")
    model = tiny_llama()
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(RecipeError, match="needs a recipe"):
        load(tmp_path / "float", quantization_config=qpass.QPassConfig())
    with pytest.raises(RecipeError, match=r"gate\*"):
        load(tmp_path / "float", quantization_config=qpass.QPassConfig("w4a8", ignore=["gate*"]))
    (tmp_path / "float" / "quanto_qmap.json").write_text("{}")  # all that quanto writes beside its weights
    with pytest.raises(RecipeError, match=r"quantized already \(optimum-quanto\).*qpass\.load\("):
        load(tmp_path / "float", quantization_config=qpass.QPassConfig("w4a8"))
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        load(tmp_path / "nan", quantization_config=qpass.QPassConfig("w4a8"))


def test_a_quantized_checkpoint_and_a_recipe(tmp_path: Path, tiny_llama: Build) -> None:
    qpass.save(qpass.quantize(tiny_llama(), "w4a16", progress=False), tmp_path)
    with pytest.raises(RecipeError, match=r"already \(compressed-tensors\).*QPassConfig\('w4a8'.*re-plans"):
        load(tmp_path, quantization_config=qpass.QPassConfig("w4a8"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "somebody", "bits": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"already \(somebody, 3 bits\)"):
        load(tmp_path, quantization_config=qpass.QPassConfig("w4a8"))


def test_the_config_says_what_it_is() -> None:
    made = qpass.QPassConfig("w4a8", ignore=["lm_head"], overrides={"*.down_proj": "w8a8"})
    assert repr(made) == "QPassConfig('w4a8', ignore=['lm_head'], overrides={'*.down_proj': 'w8a8'})"
    assert qpass.QPassConfig.from_dict(made.to_dict()).recipe == made.recipe
    assert json.loads(made.to_json_string())["quant_method"] == "qpass"


def test_going_back_to_float(tmp_path: Path, tiny_llama: Build, token_ids: torch.Tensor) -> None:
    tiny_llama().save_pretrained(tmp_path)
    online = load(tmp_path, quantization_config=qpass.QPassConfig("w8a16"))
    with torch.no_grad():
        expected = online(token_ids).logits
        back = qpass.dequantize(online)
        assert not getattr(back, "is_quantized", False) and not hasattr(back.config, "quantization_config")
        assert not any(isinstance(module, PackedLayer) for module in back.modules())
        assert (back(token_ids).logits - expected).abs().max() < 1e-4
    assert getattr(back, "hf_quantizer", None) is None
    qpass.quantize(back, "w8a16", progress=False)


@pytest.mark.parametrize("order", [
    "import qpass, transformers; qpass.QPassConfig('w4a8')",
    pytest.param("import transformers, qpass; qpass.QPassConfig('w4a8')", marks=pytest.mark.slow),
    "import transformers.quantizers.auto, qpass",
    pytest.param("import qpass, transformers.quantizers.auto", marks=pytest.mark.slow),
    pytest.param("import qpass; qpass.QPassConfig('w4a8')", marks=pytest.mark.slow)],
    ids=lambda order: order.replace(".", "_"))
def test_registered_whichever_is_imported_first(order: str) -> None:
    import subprocess
    import sys

    asked = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'qpass' in m"
    done = subprocess.run([sys.executable, "-c", f"{order}\n{asked}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unknown_transformers_imports_as_it_did(tmp_path: Path) -> None:
    """One whose loader has none of the hooks: importing it after qpass is no error, asking for our config is."""
    import subprocess
    import sys

    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "auto.py"):
        file.write_text("")
    code = ("import qpass, transformers.quantizers.auto\n"
            "try:\n    qpass.QPassConfig\nexcept ImportError as error:\n    print('told', error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and done.stdout.startswith("told"), done.stdout + done.stderr[-2000:]
