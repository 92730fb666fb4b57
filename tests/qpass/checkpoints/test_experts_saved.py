"""Experts on disk: a layer an expert and a projection in every scheme, as compressed-tensors and vLLM name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qpass
from qpass.layers.experts_layer import QuantExperts
from qpass.scheme import PRESETS
from tests.qpass.checkpoints.test_checkpoint_experts import EXPERTS, E, I, small

IDS = torch.arange(3, 19)[None]
TENSORS = {
    "fp8_dynamic": {"weight", "weight_scale"}, "fp8_per_tensor": {"weight", "weight_scale"},
    "nvfp4a16": {"weight_packed", "weight_scale", "weight_global_scale"},
    "mxfp4a16": {"weight_packed", "weight_scale"}, "mxfp8a16": {"weight", "weight_scale"},
    "mxfp6a16": {"weight_packed", "weight_scale"}, "nf4": {"weight_packed", "weight_absmax", "weight_code"},
    "w4a16": {"weight_packed", "weight_scale", "weight_shape"}, "w8a8": {"weight", "weight_scale"},
}


def quantized(scheme: str) -> Any:
    chosen = PRESETS[scheme].with_group_size(32) if scheme == "w4a16" else scheme
    recipe = qpass.Recipe(None, ignore=(), overrides={f"{EXPERTS}.*": chosen})
    return qpass.quantize(small(), recipe, progress=False)


@pytest.mark.parametrize("scheme", TENSORS)
def test_every_scheme_has_a_layer_for_each_projection(scheme: str, tmp_path: Path) -> None:
    model = quantized(scheme)
    qpass.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    experts = {name.removeprefix(EXPERTS + ".") for name in stored if name.startswith(EXPERTS)}
    assert experts == {f"{expert}.{projection}.{name}" for expert in range(E) for name in TENSORS[scheme]
                       for projection in ("gate_proj", "up_proj", "down_proj")}
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        loaded: Any = qpass.load(folder)
        assert isinstance(loaded.model.layers[0].mlp.experts, QuantExperts)
        with torch.inference_mode():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    if scheme != "nf4":  # of bitsandbytes, and no format of compressed-tensors
        same_as_theirs(model, tmp_path, stored)


def same_as_theirs(model: Any, folder: Path, stored: dict[str, Tensor]) -> None:
    """compressed-tensors' own decompressor makes the same numbers of each layer, in the dtype that it likes."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group, = config["config_groups"].values()
    assert group["targets"][0] == "Linear"
    scheme = QuantizationScheme(**group)
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    packed: Any = model.model.layers[0].mlp.experts
    for expert in range(E):
        whole = packed.dequantize(0, expert, torch.float32)
        for name, weight in (("gate_proj", whole[:I]), ("up_proj", whole[I:]),
                             ("down_proj", packed.dequantize(1, expert, torch.float32))):
            path = f"{EXPERTS}.{expert}.{name}."
            mine = {key.removeprefix(path): tensor for key, tensor in stored.items() if key.startswith(path)}
            theirs = compressor.decompress(mine, scheme)["weight"]
            assert torch.equal(theirs, weight.to(theirs.dtype))


def test_what_this_machine_leaves_in_float_others_may_round(tmp_path: Path) -> None:
    """fp8 activations are computed on some GPUs; a file written anywhere else asks for them all the same."""
    qpass.save(qpass.quantize(small(), "fp8_dynamic", progress=False), tmp_path / "first")
    qpass.save(qpass.load(tmp_path / "first"), tmp_path / "second")
    for folder in ("first", "second"):
        config = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        group, = config["config_groups"].values()
        assert group["targets"][0] == "Linear" and group["input_activations"]["strategy"] == "token"
        assert (group["input_activations"]["type"], group["input_activations"]["num_bits"]) == ("float", 8)


@pytest.mark.parametrize("only", [False, True], ids=["all layers", "experts alone"])
def test_experts_of_w4a8_are_said_to_be_w4a16(tmp_path: Path, only: bool) -> None:
    """vLLM reads W4A8 experts only from one integer a byte; as W4A16 it reads ours, and here they stay W4A8."""
    chosen = PRESETS["w4a8"].with_group_size(32)
    recipe = qpass.Recipe(None, ignore=(), overrides={f"{EXPERTS}.*": chosen}) if only else chosen
    model = qpass.quantize(small(), recipe, progress=False)
    qpass.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    of_experts = [group for group in config["config_groups"].values()
                  if only or any("experts" in target for target in group["targets"])]
    assert of_experts and all(group["input_activations"] is None for group in of_experts)
    loaded: Any = qpass.load(tmp_path)
    before, after = (one.model.layers[0].mlp.experts for one in (model, loaded))
    assert [block.spec for block in before.blocks] == [block.spec for block in after.blocks]
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "nvfp4a16"])
def test_a_state_dict_brings_back_what_gate_and_up_share(scheme: str) -> None:
    model, other = quantized(scheme), quantized(scheme)
    with torch.no_grad():
        for buffer in other.model.layers[0].mlp.experts.packed:
            buffer.zero_()
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_blocks_that_lie_in_gate_and_up_keep_them_together(tmp_path: Path) -> None:
    """96 rows of gate end within a block of 128; 128-row halves would be written apart."""
    model = quantized("fp8_block")
    qpass.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert f"{EXPERTS}.0.gate_up_proj.weight_scale" in stored and f"{EXPERTS}.0.down_proj.weight" in stored
    loaded: Any = qpass.load(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
