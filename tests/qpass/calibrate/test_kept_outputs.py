"""Kept outputs: GPTQ finds the same integers with them, runs modules less often, and keeps nothing that may change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.calibrate.activation_store import Budget
from qpass.calibrate.kept_outputs import KeptOutputs
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import output_of, small_model, tokens


def calibrated(name: str, algorithms: tuple[Any, ...], preset: str, **settings: Any) -> tuple[nn.Module, Counter[str]]:
    model, calls = small_model(name), Counter[str]()
    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.forward = _counting(path, module.forward, calls)  # type: ignore[method-assign]
    recipe = qpass.Recipe(PRESETS[preset].with_group_size(32), algorithms=algorithms)
    return qpass.quantize(model, recipe, calibration=tokens(6, 32), progress=False, **settings), calls


def _counting(path: str, forward: Any, calls: Counter[str]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[path.rpartition(".")[2]] += 1
        return forward(*args, **kwargs)

    return counted


@pytest.mark.parametrize(("name", "preset"), [
    ("llama", "w4a8"), ("gpt2", "w4a16"),
    *(pytest.param(name, "w4a8", marks=pytest.mark.slow) for name in ("qwen3", "gemma3", "phi", "bert", "mpnet"))])
def test_gptq_finds_the_same_with_fewer_runs(name: str, preset: str, monkeypatch: pytest.MonkeyPatch,
                                             tmp_path: Path) -> None:
    with_kept, calls = calibrated(name, ("gptq",), preset)
    spilled, _ = calibrated(name, ("gptq",), preset, memory_limit=1, work_folder=tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith("activations")]
    monkeypatch.setattr("qpass.calibrate.gptq.KeptOutputs", lambda *given: None)
    without, more = calibrated(name, ("gptq",), preset)
    for ids in tokens(2, 16, seed=5):
        assert torch.equal(output_of(with_kept, ids), output_of(without, ids))
        assert torch.equal(output_of(spilled, ids), output_of(without, ids))
    assert sum(calls.values()) < 0.85 * sum(more.values())


@pytest.mark.parametrize("algorithms", [
    ("gptq", "bias_correction"), ({"gptq": {"targets": ["*up_proj*"], "sweeps": 0}},),
    pytest.param(("smoothquant", "gptq"), marks=pytest.mark.slow),
    pytest.param(({"gptq": {"targets": ["*q_proj*"]}}, "gptq"), marks=pytest.mark.slow)], ids=str)
def test_beside_other_algorithms_and_targets(algorithms: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with_kept, _ = calibrated("llama", algorithms, "w4a8")
    monkeypatch.setattr("qpass.calibrate.gptq.KeptOutputs", lambda *given: None)
    without, _ = calibrated("llama", algorithms, "w4a8")
    for ids in tokens(2, 16, seed=5):
        assert torch.equal(output_of(with_kept, ids), output_of(without, ids))


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.one(x)
        y += x  # in place: what is kept must not see it
        return self.twice(self.twice(y))  # type: ignore[no-any-return]


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = _Inner(), nn.Linear(4, 4)

    def forward(self, x: Tensor, reached: Any) -> Tensor:
        y = self.inner(x)
        reached()
        return self.last(y)  # type: ignore[no-any-return]


@torch.no_grad()
def test_keeps_the_largest_modules_before_the_layer_and_nothing_called_twice() -> None:
    model, samples = _Outer(), [torch.randn(2, 4) for _ in range(3)]
    wanted = [model(x, lambda: None) for x in samples]
    kept = KeptOutputs(model, [model.inner.one, model.inner.twice, model.last], Budget(None, Path()))
    with kept.adding() as sample:
        for number, x in enumerate(samples):
            with sample(number):
                assert torch.equal(model(x, kept.reached), wanted[number])
    before = model.inner.calls
    model.inner.one.weight.zero_()
    for number, x in enumerate(samples):
        for _ in range(2):
            with kept.answering(number):
                assert torch.equal(model(x, lambda: None), wanted[number])
    assert model.inner.calls == before and "forward" not in model.inner.__dict__
    model.last.weight.zero_()  # came after: it is run
    with kept.answering(0):
        assert not torch.equal(model(samples[0], lambda: None), wanted[0])
    kept.clear()
    with kept.answering(0):
        model(samples[0], lambda: None)
    assert model.inner.calls == before + 1
    inner = KeptOutputs(model.inner, [model.inner.one, model.inner.twice], Budget(None, Path()))
    with inner.adding() as sample, sample(0):
        model.inner(samples[0])
    changed = model.inner(samples[0])
    model.inner.twice.weight.zero_()  # two calls, one answer: not kept
    with inner.answering(0):
        assert not torch.equal(model.inner(samples[0]), changed)
