"""Search roundings: what GPTQ is foretold to leave of an error is what it leaves, and what cannot be told is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy", reason="scipy is not installed")

import qpass
from qpass.budget.roundings import roundings_of
from qpass.calibrate.gptq_math import energy_order, gptq, inverse_factor
from qpass.calibrate.hessian import Hessian
from qpass.calibrate.samples import read_samples
from qpass.calibrate.scale_search import find_grid, grid_ends, round_to_grid
from qpass.calibrate.watch_inputs import watch_inputs
from qpass.decide.decision import Decision
from qpass.recipes.algorithm import AutoRound, Gptq, Scales
from qpass.scheme import PRESETS
from qpass.weight import dequantize_weight, quantize_weight
from tests.qpass.calibrate.small_models import small_model, tokens

W4 = PRESETS["w4a16"].with_group_size(32)


def decisions_of(model: torch.nn.Module) -> list[Decision]:
    return [d for d in qpass.plan(model, W4).decisions if d.status == "quantize"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_foretells_what_gptq_leaves_of_the_error(name: str) -> None:
    model, settings = small_model(name), Gptq(match_float=False, refit=False, sweeps=0)
    decisions = decisions_of(model)
    samples = read_samples(tokens(24, 48), model, max_seq_length=48)
    told = roundings_of(model, [d.site for d in decisions], (settings,), samples, lambda text: None)
    assert told.note == "" and set(told.columns) == {d.site.name for d in decisions}
    hessians = {d.site.name: Hessian(d.site.in_features) for d in decisions}
    modules = {d.site.name: model.get_submodule(d.site.owner) for d in decisions}
    with torch.no_grad(), watch_inputs(modules, {}, lambda name, x: hessians[name].add(x.flatten(0, -2))):
        for sample in samples:
            model(*sample.args, **sample.kwargs)
    for decision in decisions:
        assert decision.spec is not None
        stored, h = model.get_parameter(decision.site.name).detach(), hessians[decision.site.name].value
        weight = (stored.t() if decision.site.transposed else stored).contiguous()
        order = energy_order(h, settings.actorder)
        factor = inverse_factor(h, order, settings.dampening_frac)
        grid = find_grid(weight, decision.spec, "signed", torch.float32, factor.importance(order), compensated=True)
        codes = gptq(weight, factor, order, grid, grid_ends(decision.spec))
        nearest = round_to_grid(weight, grid, decision.spec, torch.float32)
        spread = (codes.view(*grid.scale.shape, -1) * grid.scale.unsqueeze(-1)).view_as(weight)
        rounded, foretold = told.of(stored, decision.site, decision.spec)
        plain = dequantize_weight(nearest, decision.spec)
        apart = (rounded.t() if decision.site.transposed else rounded) - plain
        assert float(apart.abs().mean()) < 0.01 * float((plain - weight).abs().mean())  # an equally good range or two

        damped = h + settings.dampening_frac * h.diagonal().mean() * torch.eye(len(h))
        left = float((((spread - weight) @ damped) * (spread - weight)).sum())
        # Of rounding to nearest the diagonal alone counts: errors of different columns have nothing in common.
        nearest_costs = float(((plain - weight).square() * h.diagonal()).sum())
        assert left / nearest_costs == pytest.approx(foretold, rel=0.35) and foretold < 1


def test_rounds_as_the_recipe_will() -> None:
    model = small_model("llama")
    decision = decisions_of(model)[0]
    assert decision.spec is not None
    samples = read_samples(tokens(2, 16), model, max_seq_length=16)
    weight = model.get_parameter(decision.site.name).detach()

    def rounded(*algorithms: object) -> Tensor:
        told = roundings_of(model, [decision.site], algorithms, samples, lambda text: None)  # type: ignore[arg-type]
        found, factor = told.of(weight, decision.site, decision.spec)  # type: ignore[arg-type]
        assert factor == 1.0
        return found

    nearest = dequantize_weight(quantize_weight(weight, decision.spec, torch.float32), decision.spec)
    assert torch.equal(rounded(), nearest) and torch.equal(rounded(AutoRound()), nearest)
    grid = find_grid(weight, decision.spec, "signed", torch.float32)
    signed = dequantize_weight(round_to_grid(weight, grid, decision.spec, torch.float32), decision.spec)
    assert torch.equal(rounded(Scales()), signed) and not torch.equal(signed, nearest)
    assert torch.equal(rounded(Gptq()), signed)  # 32 tokens say nothing of 64 columns


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_search_for_gptq_costs_less_and_says_when_it_cannot_tell(name: str, capsys: pytest.CaptureFixture[str]
                                                                   ) -> None:
    schemes = [PRESETS[scheme].with_group_size(32) for scheme in ("w3a16", "w4a16", "w6a16")]

    def estimate(count: int, *algorithms: str) -> float:
        recipe = qpass.search(small_model(name), "5 bits", data=tokens(count, 32), schemes=schemes,
                              algorithms=algorithms)
        assert [one.name for one in recipe.algorithms] == list(algorithms)
        assert qpass.plan(small_model(name), recipe).totals.bits_per_weight <= 5 + 1e-6
        printed = capsys.readouterr().out
        line, = [line for line in printed.splitlines() if "<- chosen" in line]
        assert ("too few to tell" in printed) is (bool(algorithms) and count < 4)
        return float(line.split()[2])

    assert estimate(12, "gptq") < 0.9 * estimate(12)
    assert estimate(2, "gptq") < 1.1 * estimate(2)
