"""Damaged and hostile checkpoints: each is a named error, before memory is allocated for what it says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import qpass
from qpass.errors import CheckpointError
from tests.qpass.formats.fixture_folders import SMALL

pytest.importorskip("transformers", reason="Transformers is not installed")
Q = "model.layers.0.self_attn.q_proj"


def rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def reconfigure(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "quantize_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def said(**fields: Any) -> Callable[[Path], None]:
    return reconfigure(lambda config: config["quantization_config"].update(fields))


def absurd_header(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def doubled_header(folder: Path) -> None:
    one = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = b"{" + one + b"," + one + b"}"
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "g_idx range": (rewrite(lambda t: t[Q + ".g_idx"].fill_(77)), r"g_idx holds 77 to 77, and there are 4 groups"),
    "g_idx uneven": (rewrite(lambda t: t[Q + ".g_idx"].fill_(1)), "g_idx puts 0 to 128 inputs"),
    "g_idx dtype": (rewrite(lambda t: t.update({Q + ".g_idx": t[Q + ".g_idx"].float()})), "g_idx in .* needs"),
    "scale nan": (rewrite(lambda t: t[Q + ".scales"].fill_(float("nan"))), "q_proj.*scales holds NaN"),
    "scale zero": (rewrite(lambda t: t[Q + ".scales"][0].fill_(0)), "q_proj.*scales holds zeros"),
    "scale dtype": (rewrite(lambda t: t.update({Q + ".scales": t[Q + ".scales"].double()})), "scales in .* needs"),
    "qweight shape": (rewrite(lambda t: t.update({Q + ".qweight": t[Q + ".qweight"][:-1].clone()})), "qweight in .*"),
    "no zeros": (rewrite(lambda t: t.pop(Q + ".qzeros")), r"needs .*q_proj\.qzeros"),
    "bits": (said(bits=9), "bits is 9"), "bits text": (said(bits="4"), "bits is '4'"),
    "group negative": (said(group_size=-7), "group_size is -7"), "group zero": (said(group_size=0), "group_size is 0"),
    "group odd": (said(group_size=48), "qzeros in .*"), "group huge": (said(group_size=10**30), "qzeros in .*"),
    "sym": (said(sym="yes"), "'yes'"), "layout": (said(checkpoint_format="marlin"), "'marlin'"),
    "dynamic": (said(dynamic={"+:(": {"bits": 8}}), "dynamic"), "dynamic list": (said(dynamic=[1]), "dynamic is list"),
    "layers": (reconfigure(lambda c: c.update(num_hidden_layers=10**9)), "num_hidden_layers is 1000000000"),
    "width": (reconfigure(lambda c: c.update(hidden_size=2**50)), "cannot be built|disagree|needs"),
    "classes": (reconfigure(lambda c: c.update(architectures=5)), r"config\.json: architectures is 5"),
    "heads": (reconfigure(lambda c: c.update(num_attention_heads=0)), r"config\.json"),
    "tables": (reconfigure(lambda c: c.update(model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"],
                                              max_position_embeddings=90000)), "computes tables of [0-9]+ bytes"),
    "header": (absurd_header, "truncated or damaged"), "doubled": (doubled_header, "truncated or damaged"),
    "pipe": (pipe, "no ordinary file"),
    "quantization": (reconfigure(lambda c: c.update(quantization_config=[1])), "list"),
    "doubled key": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "'a' stands there twice"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    folder = tmp_path / "out"
    shutil.copytree(SMALL / "gptq" / "w4_g32_descact", folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=expected):
        qpass.load(folder)


def test_links_lead_nowhere_out_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "elsewhere.safetensors"
    shutil.copytree(SMALL / "gptq" / "w4_g32_descact", folder)
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"is a link to .*out of its folder"):
        qpass.load(folder)
    # As the cache of Hugging Face has it.
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "revision", tmp_path / "cache" / "blobs"
    shutil.copytree(SMALL / "gptq" / "w4_g32_descact", snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    assert qpass.explain(qpass.load(snapshot)).counts["quantized"]


@pytest.mark.parametrize("where", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "", 7, None])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, where: Any) -> None:
    folder = tmp_path / "out"
    shutil.copytree(SMALL / "gptq" / "w4_g32_descact", folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q + ".qweight": where}}))
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        qpass.load(folder)


@pytest.mark.parametrize("said", ["8", [8], {"a": 8}, None, 2**70])
def test_settings_of_another_kind_are_passed_over_or_named(tmp_path: Path, said: Any) -> None:
    folder = tmp_path / "out"
    shutil.copytree(SMALL / "autoround" / "ar_w4_g32_asym", folder)
    reconfigure(lambda config: config["quantization_config"].update(act_bits=said, act_dynamic=False))(folder)
    assert qpass.explain(qpass.load(folder)).counts["quantized"]


def test_a_config_that_lost_its_quantization_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(SMALL / "bitsandbytes" / "nf4_dq", folder)
    reconfigure(lambda config: config.pop("quantization_config"))(folder)
    with pytest.raises(CheckpointError, match="put quantization_config back"):
        qpass.load(folder)


@pytest.mark.parametrize("name", ["hqq/st_w4_g64", "gptq/w4_g32_asym", "compressed-tensors/w4a16_asym"])
@pytest.mark.parametrize("size", [0, -64])
def test_sizes_that_no_layer_has_are_named(tmp_path: Path, name: str, size: int) -> None:
    folder = tmp_path / "out"
    shutil.copytree(SMALL / name, folder)
    reconfigure(lambda config: config.update(intermediate_size=size))(folder)
    with pytest.raises(CheckpointError):
        qpass.load(folder)


@pytest.mark.parametrize(("name", "key", "value"), [
    ("compressed-tensors/w4a16_asym", "ignore", 7), ("compressed-tensors/w4a16_asym", "ignore", ["re:("]),
    ("compressed-tensors/w4a16_asym", "qpass", [1]), ("quark/int4_wo_32", "layer_quant_config", 3),
    ("compressed-tensors/w4a16_asym", "ignore", [4])])
def test_what_no_format_thought_of_is_named(tmp_path: Path, name: str, key: str, value: Any) -> None:
    folder = tmp_path / "out"
    shutil.copytree(SMALL / name, folder)
    reconfigure(lambda config: config["quantization_config"].update({key: value}))(folder)
    with pytest.raises(CheckpointError, match="its config or its headers"):
        qpass.load(folder)
    with pytest.raises(CheckpointError):
        qpass.inspect(folder)
