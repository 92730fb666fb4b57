"""Plans of folders and configs: what they say before anything is read is what the loaded model then takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qpass
from qpass.layers.packed_layers import PackedLayer

Build = Callable[..., torch.nn.Module]


@pytest.mark.parametrize(("family", "recipe"), [
    ("llama", qpass.Recipe("w4a8")), ("tied_llama", qpass.Recipe("w8a8", ignore=[])), ("gpt2", qpass.Recipe("w8a16")),
    ("mixtral", qpass.Recipe("w4a8")), ("llama", qpass.Recipe("nf4")), ("llama", qpass.Recipe("mxfp6a16")),
    ("mixtral", qpass.Recipe("nvfp4a16")), ("llama", qpass.Recipe("w3a16"))],
    ids=["llama", "tied head packed", "gpt2", "experts", "nf4", "mxfp6", "experts of nvfp4", "3 bits"])
def test_bytes_are_those_of_the_model(family: str, recipe: qpass.Recipe, tmp_path: Path, tiny_model: Build) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    plan = qpass.plan(tmp_path / "float", recipe)
    assert plan.footprint is not None
    assert plan.footprint == qpass.plan(model.config, recipe).footprint
    loaded = qpass.load(tmp_path / "float", recipe)
    packed = [m for m in loaded.modules() if isinstance(m, PackedLayer)]
    seen = {t.data_ptr(): t.nbytes for t in (*loaded.parameters(), *(t for m in packed for t in m.packed))}
    # Layouts pad some tensors; these layers are so small that it shows.
    assert sum(seen.values()) == pytest.approx(plan.footprint.memory, rel=0.15)
    qpass.save(loaded, tmp_path / "saved")
    file = (tmp_path / "saved" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "saved" / "model.safetensors").read_bytes()[:8], "little")
    shapes = 16 * sum(1 for m in packed for name in m.on_disk if name.endswith("weight_shape"))
    assert file - header - 8 - shapes == pytest.approx(plan.footprint.disk, rel=0.02)
    assert plan.footprint.float_disk == sum(p.nbytes for p in model.parameters())
    assert plan.footprint.memory < plan.footprint.peak <= plan.footprint.memory + plan.footprint.float_disk
    assert sum(plan.footprint.kernels.values()) == len([d for d in plan.decisions if d.site.kind != "embedding"])
    assert "while loading" in str(plan) and '"a_token"' in plan.to_json()
