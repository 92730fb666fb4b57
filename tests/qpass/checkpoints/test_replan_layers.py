"""Re-planning: a recipe on a quantized checkpoint changes what activations are rounded to, and no integer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import CheckpointError, NothingQuantized
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.weight import CanonicalWeight

X = torch.linspace(-2, 2, 3 * 64).reshape(3, 64)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def saved(folder: Path, scheme: str) -> Path:
    torch.manual_seed(1)
    return qpass.save(qpass.quantize(net(), scheme, example_inputs=(X,), progress=False), folder)


def packed(model: nn.Module) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym"])
def test_int4_weights_run_as_w4a8_on_the_same_integers(tmp_path: Path, scheme: str) -> None:
    folder = saved(tmp_path / "out", scheme)
    plain = qpass.load(folder, model=net())
    again = qpass.load(folder, "w4a8", model=net())
    assert [layer.spec.family for layer in packed(again)] == ["w4a8", "w4a8"]
    for before, after in zip(packed(plain), packed(again), strict=True):
        one, other = before.canonical().tensors, after.canonical().tensors
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert after.spec.weight == before.spec.weight
    difference = (again(X) - plain(X)).norm() / plain(X).norm()
    assert 0 < difference < 0.05
    report = qpass.explain(again)
    assert any("re-planned" in note for note in report.notes)
    assert {row.effective for row in report.rows if row.status == "quantized"} == {
        "w4a8 g64" + (" asym" if "asym" in scheme else "")}


def test_faked_zero_points_give_equal_results() -> None:
    torch.manual_seed(2)
    layer = packed(qpass.quantize(net(), "w4a8", example_inputs=(X,), progress=False))[0]
    assert isinstance(layer, QuantLinear)
    weight, spec = layer.canonical(), layer.spec
    zeros = torch.zeros_like(weight.scale, dtype=torch.int8)
    asym = replace(spec, weight=replace(spec.weight, symmetric=False))
    faked = QuantLinear(CanonicalWeight({**weight.tensors, "zero_point": zeros}), layer.bias, asym, layer.dtype)
    for x in (X, torch.randn(1, 64), torch.randn(5, 7, 64)):
        assert torch.equal(_run(faked, x), _run(layer, x))


def _run(layer: QuantLinear, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(x)  # type: ignore[no-any-return]


def test_other_widths_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", "w4a16")
    with pytest.raises(CheckpointError, match=r"0: w8a8 wants int8 weights, the checkpoint has int4"):
        qpass.load(folder, "w8a8", model=net())
    with pytest.raises(CheckpointError, match=r"0: nf4 wants nf4 weights, the checkpoint has int4"):
        qpass.load(folder, "nf4", model=net())
    with pytest.raises(NothingQuantized, match="quantizes no layer"):
        qpass.load(folder, qpass.Recipe("w4a8", ignore=("0", "2"), overrides={}), model=net())


def test_what_the_recipe_keeps_stays_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", "w4a16")
    model = qpass.load(folder, qpass.Recipe("w4a8", overrides={"2": None}), model=net())
    assert [layer.spec.family for layer in packed(model)] == ["w4a8", "w4a16"]
    assert any("keeps 2 in float" in note for note in qpass.explain(model).notes)
