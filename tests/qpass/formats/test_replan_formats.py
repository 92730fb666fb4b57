"""Re-planning: `recipe="w4a8"` on the int4 checkpoints of every tool, the same integers on W4A8 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.layers.packed_layers import PackedWeight
from tests.qpass.formats.fixture_folders import SMALL

pytest.importorskip("transformers", reason="Transformers is not installed")
INT4 = ("compressed-tensors/w4a16_asym", "gptq/w4_g32_asym", "gptq/w4_g32_descact", "awq/gptqmodel_gemm_g32",
        "autoround/ar_w4_g32_asym", "quark/int4_wo_32", "gguf/q4_0")


@pytest.mark.parametrize("name", INT4)
def test_the_same_integers_as_w4a8(name: str) -> None:
    where: Path = next(iter((SMALL / name).glob("*.gguf")), SMALL / name)
    plain, again = qpass.load(where, dtype=torch.float32), qpass.load(where, "w4a8", dtype=torch.float32)
    layers: dict[str, Any] = {path: layer for path, layer in plain.named_modules() if isinstance(layer, PackedWeight)}
    families = set()
    for path, before in layers.items():
        after: Any = again.get_submodule(path)
        one, other = before.canonical().tensors, after.canonical().tensors
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        families.add(after.spec.family)
    assert "w4a8" in families and families <= {"w4a8", "w4a16", "w8a16"}
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        difference = (again(ids).logits - plain(ids).logits).norm() / plain(ids).logits.norm()
    assert 0 < difference < 0.1
