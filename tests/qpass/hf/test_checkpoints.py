"""Quantized checkpoints through AutoModelForCausalLM: what Transformers cannot load, and what it is told to leave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.errors import CheckpointError
from qpass.layers.packed_layers import PackedWeight
from tests.qpass.formats.fixture_folders import SMALL

transformers = pytest.importorskip("transformers", minversion="5")
checkpoints = pytest.importorskip("qpass.hf.checkpoints")
IDS = torch.arange(1, 13)[None]


def from_pretrained(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


def same(model: Any, folder: Path, **options: Any) -> None:
    """What qpass.load makes of the folder, in the class that Transformers gives."""
    other: Any = qpass.load(folder, **options)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, other(IDS).logits)
    assert type(model) is type(other) and not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    assert packed and qpass.explain(model).counts["quantized"] == len(packed)


@pytest.mark.parametrize("name", ["modelopt/nvfp4", "gptq/w4_g32_asym", "hqq/st_w4_g64", "autoround/ar_w4_g32_asym"])
def test_formats_that_transformers_leaves_are_loaded_here(name: str) -> None:
    assert qpass.QPassConfig is not None  # looking it up makes qpass known to Transformers
    model = from_pretrained(SMALL / name)
    same(model, SMALL / name)
    with torch.inference_mode():
        assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 15)


@pytest.mark.parametrize("name", ["compressed-tensors/w4a16_asym", "bitsandbytes/nf4_dq"])
def test_a_config_without_recipe_has_any_format_loaded_here(name: str) -> None:
    same(from_pretrained(SMALL / name, quantization_config=qpass.QPassConfig()), SMALL / name)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["w4afp8", "w8a8", "fp8_block", "fp8_dynamic", "mxfp8", "mxfp4", "nvfp4", "nf4"])
def test_what_was_saved_comes_back_without_an_argument(scheme: str, family: str, tmp_path: Path, tiny_model: Any,
                                                       token_ids: torch.Tensor) -> None:
    """The same layers, by whatever means Transformers would have read them itself."""
    assert qpass.QPassConfig is not None
    tiny_model(family).bfloat16().save_pretrained(tmp_path / "float")
    made = from_pretrained(tmp_path / "float", quantization_config=qpass.QPassConfig(scheme))
    made.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(again(token_ids).logits, made(token_ids).logits)
    assert str(qpass.explain(again)) == str(qpass.explain(made)) and type(again) is type(made)
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_another_config_leaves_it_to_transformers(tmp_path: Path, tiny_llama: Any) -> None:
    pytest.importorskip("compressed_tensors")
    qpass.quantize(tiny_llama(), "w4afp8", progress=False).save_pretrained(tmp_path)
    theirs = from_pretrained(tmp_path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    ours: Any = qpass.dequantize(qpass.load(tmp_path))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_bitsandbytes_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    same(from_pretrained(SMALL / "bitsandbytes" / "nf4_dq"), SMALL / "bitsandbytes" / "nf4_dq")


def test_the_dtype_asked_for_and_saving(tmp_path: Path) -> None:
    folder = SMALL / "gptq" / "w4_g32_asym"
    model = from_pretrained(folder, quantization_config=qpass.QPassConfig(), dtype=torch.float32, device_map="cpu")
    assert model.dtype == torch.float32
    same(model, folder, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "compressed-tensors")
    same(model, tmp_path, dtype=torch.float32)


def test_what_is_wrong_is_said_as_by_load(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(SMALL / "modelopt" / "nvfp4", folder)
    assert qpass.QPassConfig is not None
    with pytest.raises(CheckpointError, match="spreads the checkpoint over cpu, cuda:0"):
        from_pretrained(folder, device_map={"model": "cpu", "lm_head": "cuda:0"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(CheckpointError, match="needs"):
        from_pretrained(folder)
