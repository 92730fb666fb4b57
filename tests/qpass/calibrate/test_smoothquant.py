"""SmoothQuant and the pairs it folds into: the float model stays what it was, and 8-bit activations lose less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qpass
from qpass.calibrate.fold import common_factors, fold
from qpass.calibrate.pairs import find_pairs
from qpass.calibrate.smoothquant_math import factors_of, search_factors
from qpass.capture.capture_model import capture
from tests.qpass.calibrate.small_models import ARCHITECTURES, output_error, output_of, small_model, tokens

PAIRS_A_LAYER = {"llama": 4, "qwen3": 4, "gemma3": 4, "gpt2": 3, "phi": 2, "bert": 1, "mpnet": 1}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_changes_nothing(name: str) -> None:
    """Every pair that the graph shows, with factors far from 1."""
    model, ids = small_model(name), tokens(1)[0]
    wanted = output_of(model, ids)
    pairs = find_pairs(capture(model))
    assert sum(".0." in pair.readers[0][0] for pair in pairs) == PAIRS_A_LAYER[name]
    parameters = dict(model.named_parameters())
    for pair in pairs:
        before = {key: parameters[key].detach().clone() for key in pair.parameters}
        factors = common_factors(pair, torch.rand(len(pair.takers[0].index)) * 4 + 0.25)
        fold(parameters, pair, factors)
        assert all(not torch.equal(parameters[key], before[key]) for key in pair.parameters)
    torch.testing.assert_close(output_of(model, ids), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_grouped_heads_share_a_factor() -> None:
    pair = next(p for p in find_pairs(capture(small_model("llama"))) if "o_proj" in p.readers[0][0])
    index = torch.tensor(pair.takers[0].index)
    assert index.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]  # 4 heads read 2 of 16
    factors = common_factors(pair, torch.rand(64) + 0.5)
    assert torch.equal(factors[:16], factors[16:32]) and torch.equal(factors[32:48], factors[48:])


def test_factors() -> None:
    s = factors_of(torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert s.tolist() == [2.0, 1.0, 1.0]


def test_the_search_takes_what_rounds_best_and_never_less_than_nothing() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 32), torch.randn(48, 32)
    x[:, 3] *= 50

    def rounded(t: torch.Tensor) -> torch.Tensor:
        s = t.abs().amax(-1, keepdim=True) / 127
        return (t / s).round() * s

    def error(s: torch.Tensor) -> float:
        wanted = x @ w.t()
        return float(((rounded(x / s) @ rounded(w * s).t() - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())

    x_amax, w_amax = x.abs().amax(0), w.abs().amax(0)
    found = search_factors(x, [w[:16], w[16:]], rounded, [rounded, rounded], x_amax, w_amax, lambda s: s)
    assert error(found) < 0.2 * error(torch.ones(32))
    assert error(found) <= min(error(factors_of(x_amax, w_amax, alpha)) for alpha in (0.3, 0.5, 0.7))
    plain = search_factors(x, [w], lambda t: t, [lambda t: t], x_amax, w_amax, lambda s: s)
    assert torch.equal(plain, torch.ones(32))


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow), "gpt2"])
def test_outliers_cost_less(name: str, tmp_path: Path) -> None:
    """A few channels of every norm are made thirty times as large, and the columns that meet them as much smaller."""
    def spiked() -> torch.nn.Module:
        model = small_model(name)
        parameters = dict(model.named_parameters())
        for pair in find_pairs(capture(model)):
            if any(word in pair.takers[0].parameter for word in ("norm", ".ln_")):
                factors = torch.ones(len(pair.takers[0].index))
                factors[:3] = 1 / 30
                fold(parameters, pair, factors)
        return model

    data, reference = tokens(), spiked()
    nearest = qpass.quantize(spiked(), "w8a8", progress=False)
    recipe = qpass.Recipe("w8a8", algorithms=["smoothquant"])
    model = qpass.quantize(spiked(), recipe, calibration=data, progress=False)
    assert output_error(model, reference, data) < 0.5 * output_error(nearest, reference, data)
    both = qpass.quantize(spiked(), qpass.Recipe("w8a8", algorithms=["smoothquant", "gptq"]), calibration=data,
                          progress=False)
    assert output_error(both, reference, data) < 0.5 * output_error(nearest, reference, data)
    qpass.save(model, tmp_path)
    assert torch.equal(output_of(qpass.load(tmp_path), data[0]), output_of(model, data[0]))
    assert any("no parameter can take factors off" in note for note in qpass.explain(model).notes) == (name == "gpt2")
