"""Experts: GPTQ rounds each on its own tokens, one without enough is named, and what was found is kept and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.calibrate import gptq
from qpass.scheme import PRESETS
from tests.small_experts import Experts, Mixture

_HIDDEN, _STARVED = 64, 3


class Layer(nn.Module):
    """A linear and a mixture, each added to its input; expert 3 is not chosen where column 0 is positive."""

    def __init__(self, **form: Any) -> None:
        super().__init__()
        self.inner, self.mlp = nn.Linear(_HIDDEN, _HIDDEN), Mixture(Experts(4, _HIDDEN, 32, **form))
        self.mlp.gate.weight.data[_STARVED] = 0
        self.mlp.gate.weight.data[_STARVED, 0] = -50

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * self.inner(x)
        return x + 0.1 * self.mlp(x)


class Net(nn.Module):
    def __init__(self, **form: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(**form), Layer(**form)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def net(**form: Any) -> Net:
    torch.manual_seed(0)
    return Net(**form).eval()


def inputs(count: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(_HIDDEN, _HIDDEN, generator=torch.Generator().manual_seed(5)) * torch.rand(
        _HIDDEN, generator=torch.Generator().manual_seed(6)).square()
    found = [torch.randn(300, _HIDDEN, generator=draw) @ mix for _ in range(count)]
    for x in found:
        x[:, 0] = 4 + x[:, 0].abs()
    return found


def recipe(name: str, algorithms: list[Any]) -> qpass.Recipe:
    return qpass.Recipe(PRESETS[name].with_group_size(32), ignore=["*.gate"], algorithms=algorithms)


def quantized(name: str, algorithms: list[Any], form: dict[str, bool], **settings: Any) -> nn.Module:
    data = inputs(3) if algorithms else None
    return qpass.quantize(net(**form), recipe(name, algorithms), example_inputs=(inputs(1)[0],), calibration=data,
                          progress=False, **settings)


@pytest.mark.parametrize(("name", "form"), [("w4a16", {}), ("w4a8", {"biased": True, "alternating": True})],
                         ids=["w4a16", "w4a8-biased-alternating"])
def test_each_expert_is_rounded_on_its_own_tokens(name: str, form: dict[str, bool], tmp_path: Path) -> None:
    reference, fresh = net(**form), inputs(2, seed=9)
    model = quantized(name, ["gptq"], form)
    nearest = quantized(name, [], form)

    def error(made: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((made(x) - reference(x)).square().sum() for x in fresh))

    assert error(model) < 0.7 * error(nearest)
    notes = "\n".join(qpass.explain(model).notes)
    assert f"gptq: experts {_STARVED} of layers.0.mlp.experts saw fewer tokens" in notes
    assert "rounded to nearest; of the algorithms" not in notes
    path = tmp_path / "model"
    qpass.save(model, path)
    with torch.no_grad():
        assert torch.equal(qpass.load(path, model=net(**form))(fresh[0]), model(fresh[0]))


def test_experts_found_before_an_interruption_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real, done = quantized("w4a16", ["gptq"], {}), gptq.calibrate, []

    def interrupted(settings: Any, work: Any) -> None:
        if done and done[-1] != "resumed":
            raise KeyboardInterrupt
        done.append(work.block.path)
        real(settings, work)

    monkeypatch.setattr(gptq, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized("w4a16", ["gptq"], {}, work_folder=tmp_path)
    done.append("resumed")
    again, x = quantized("w4a16", ["gptq"], {}, work_folder=tmp_path), inputs(1)[0]
    assert done == ["layers.0", "resumed", "layers.1"]
    with torch.no_grad():
        assert torch.equal(again(x), whole(x))
