"""Factors that no parameter can take: the layers scale their inputs themselves, are saved so, and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.layers.packed_layers import QuantLinear
from qpass.layers.reordered_linear import ReorderedLinear
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import output_error, output_of, small_model, tokens

W4A16 = PRESETS["w4a16"].with_group_size(32)


def spiked() -> nn.Module:
    """A GPT-2 with a few outputs of GELU much larger than the others, and the columns that meet them smaller."""
    model = small_model("gpt2")
    for block in model.transformer.h:  # type: ignore[union-attr]
        block.mlp.c_fc.bias.data[:3] += 30
        block.mlp.c_proj.weight.data[:3] /= 30
    return model


def scaled_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, ReorderedLinear)]


@pytest.mark.parametrize(("scheme", "algorithm"), [(W4A16, "awq"), ("w8a8", "smoothquant")], ids=["awq", "smoothquant"])
def test_they_cost_less_and_come_back(scheme: Any, algorithm: str, tmp_path: Path) -> None:
    data, reference = tokens(6), spiked()
    left, done = (qpass.quantize(spiked(), qpass.Recipe(scheme, algorithms=[{algorithm: {"run_time": way}}]),
                                 calibration=data, progress=False) for way in (False, True))
    assert not scaled_layers(left) and any("nothing can take factors off" in note for note in qpass.explain(left).notes)
    layers = scaled_layers(done)
    assert [f"transformer.h.{number}.mlp.c_proj" in layers for number in (0, 1)] == [True, True]
    assert output_error(done, reference, data) < 0.7 * output_error(left, reference, data)
    report = qpass.explain(done)
    assert any("these layers scale it at run time" in note for note in report.notes)
    assert all(("scaled channel by channel at run time" in row.reason) == (row.name.removesuffix(".weight") in layers)
               for row in report.rows if row.status == "quantized")
    assert not any(module._forward_pre_hooks for module in done.modules())
    want = output_of(done, data[0])
    qpass.save(done, tmp_path / "saved")
    back = qpass.load(tmp_path / "saved")
    assert scaled_layers(back) == layers and torch.equal(output_of(back, data[0]), want)
    config = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    formats = {target: group["format"] for group in config["config_groups"].values() for target in group["targets"]}
    assert all((formats[target] == "qpass") == (target in layers) for target in formats)  # others must refuse these
    floats = output_of(qpass.dequantize(done), data[0])
    if algorithm == "awq":  # activations are not rounded
        torch.testing.assert_close(floats, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_an_interruption_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = tokens(4), qpass.Recipe(W4A16, algorithms=["awq", "gptq"])
    want = output_of(qpass.quantize(spiked(), recipe, calibration=data, progress=False), data[0])
    from qpass.calibrate import gptq

    real, calls = gptq.calibrate, []

    def once(settings: Any, work: Any) -> None:
        calls.append(work)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(settings, work)

    monkeypatch.setattr(gptq, "calibrate", once)
    model = spiked()
    with pytest.raises(KeyboardInterrupt):
        qpass.quantize(model, recipe, calibration=data, progress=False, work_folder=tmp_path)
    float_block = model.transformer.h[1]  # type: ignore[union-attr,index]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(float_block.mlp.c_proj.weight, spiked().transformer.h[1].mlp.c_proj.weight)  # type: ignore[union-attr,index]
    monkeypatch.undo()
    again = qpass.quantize(spiked(), recipe, calibration=data, progress=False, work_folder=tmp_path)
    assert torch.equal(output_of(again, data[0]), want) and scaled_layers(again)


class Parallel(nn.Module):
    """Three products of an activation that nothing can be divided before."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x) * torch.linspace(0.1, 20, 64)
        return self.q(x) + self.k(x) * self.v(x)


def test_products_of_one_input_hold_one_scale() -> None:
    torch.manual_seed(0)
    model, data = Parallel().eval(), [torch.randn(1, 16, 64) for _ in range(4)]
    qpass.quantize(model, {"scheme": "w8a8", "algorithms": [{"smoothquant": {"alpha": 0.5}}]}, calibration=data,
                   example_inputs=data[0], progress=False)
    assert type(model.q) is ReorderedLinear and isinstance(model.q, QuantLinear)
    assert model.q.pre_scale is model.k.pre_scale is model.v.pre_scale
    x = torch.randn(1, 3, 64)
    torch.testing.assert_close(nn.functional.linear(x, model.q.weight, model.q.bias), model.q(x))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_graph_rounds_their_input_once() -> None:
    torch.manual_seed(0)
    model, data = Parallel().eval(), [torch.randn(1, 16, 64) for _ in range(4)]
    qpass.quantize(model, {"scheme": "w8a8", "algorithms": [{"smoothquant": {"alpha": 0.5}}]}, calibration=data,
                   example_inputs=data[0], progress=False)
    want = model(data[0])
    with torch.no_grad():
        got = torch.compile(model)(data[0])
    assert (got - want).norm() < 0.02 * want.norm()
    said = [row.activation for row in qpass.explain(model).rows]
    assert sum("shared" in text for text in said) == 2, said
