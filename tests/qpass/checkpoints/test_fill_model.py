"""Fill: a layer that is read and packed some rows at a time holds what it held when it was saved, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qpass
import qpass.checkpoints.fill_model as fill_model
from qpass.formats.safetensors_folder import SafetensorsFolder
from qpass.kernels.cpu import native
from qpass.layers.packed_layers import PackedLayer
from qpass.weight import CanonicalWeight


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 200, dtype=torch.bfloat16), nn.ReLU(), nn.Linear(200, 40, dtype=torch.bfloat16))


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w8a16", "w4a8_int_scales", "w4a8_channel", "w5a16", "w4a16_asym"])
def test_rows_some_at_a_time(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = qpass.Recipe(scheme, ignore=[], on_indivisible="adjust")
    x = torch.randn(2, 256).bfloat16()
    model = qpass.quantize(made(), recipe, progress=False, example_inputs=x)
    qpass.save(model, tmp_path)
    monkeypatch.setattr(fill_model, "_AT_ONCE", 64 * 256)
    read, seen = SafetensorsFolder.read, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("rows"))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(SafetensorsFolder, "read", watched)
    loaded = qpass.load(tmp_path, model=made())
    if native.prepare() is None and scheme in ("w4a8", "w8a8", "w8a16", "w4a8_int_scales", "w4a8_channel"):
        assert {(0, 64), (192, 200)} <= {(rows.start, rows.stop) for rows in seen if rows is not None}
    for one, other in zip(model.modules(), loaded.modules(), strict=True):
        if isinstance(one, PackedLayer):
            assert isinstance(other, PackedLayer) and other.on_disk == one.on_disk and other.on_disk
            assert all(torch.equal(a, b) for a, b in zip(one.packed, other.packed, strict=True))
    assert torch.equal(loaded(x), model(x))
    first, second = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_integers_that_do_not_fit_are_found_wherever_they_are() -> None:
    if (why := native.prepare()) is not None:
        pytest.skip(why)
    q = torch.randint(-8, 8, (50, 200), dtype=torch.int8)
    native.pack(CanonicalWeight({"qweight": q}), 4)
    for place in ((0, 0), (15, 63), (31, 100), (47, 191), (49, 199)):
        for value in (8, -9, 127, -128):
            broken = q.clone()
            broken[place] = value
            with pytest.raises(ValueError, match="does not fit 4 bits"):
                native.pack(CanonicalWeight({"qweight": broken}), 4)
