"""Search: costs follow the KL that is measured, the allocation is the best one and keeps groups, the recipe works."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy", reason="scipy is not installed")

import qpass
from qpass.budget.allocation import Choice, allocate, read_budget
from qpass.budget.search_recipe import groups_of
from qpass.errors import RecipeError
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import output_of, small_model, tokens

SCHEMES = [PRESETS[name].with_group_size(32) for name in ("w3a16", "w4a16", "w6a16")] + [PRESETS["w8a8"]]


def test_allocation_is_the_best_of_all() -> None:
    torch.manual_seed(0)
    groups = [[Choice(scheme=str(i), cost=float(torch.rand(())), size=float(torch.rand(()))) for i in range(3)]
              for _ in range(6)]
    limit = 0.9 * sum(sum(c.size for c in group) / 3 for group in groups)
    every = [sum(c.cost for c in picked) for picked in product(*groups) if sum(c.size for c in picked) <= limit]
    found = allocate(groups, limit)
    assert sum(choice.size for choice in found) <= limit * (1 + 1e-9)
    assert sum(choice.cost for choice in found) == pytest.approx(min(every), rel=1e-3)
    with pytest.raises(RecipeError, match="is below"):
        allocate(groups, 0.5 * sum(min(c.size for c in group) for group in groups))


def test_budgets() -> None:
    assert (read_budget("4.5 bits").kind, read_budget("4.5 bits").value) == ("bits", 4.5)
    assert read_budget("1.5 MB") == read_budget(1_500_000) == read_budget("1500000 bytes")
    assert read_budget("30 tokens per second") == read_budget("30 tokens/s")
    for wrong in ("4.5 apples", "bits", "-3 bits", "0 bits", None):
        with pytest.raises(RecipeError, match="not a budget"):
            read_budget(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_meets_the_budget_and_beats_one_scheme_for_all(name: str, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = qpass.search(model, "5.1 bits", data=tokens(16, 32), schemes=SCHEMES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
    assert "<- chosen" in capsys.readouterr().out
    assert qpass.Recipe.from_dict(recipe.to_dict()) == recipe
    plan = qpass.plan(model, recipe)
    assert plan.totals.bits_per_weight <= 5.1 + 1e-6
    schemes = {d.site.name: d.scheme for d in plan.decisions if d.status == "quantize"}
    assert len(set(schemes.values())) > 1
    for group in groups_of([d for d in plan.decisions if d.status == "quantize"]):
        assert len({schemes[site] for site in group}) == 1
    data = tokens(6, 32, seed=3)
    wanted = [output_of(small_model(name), ids).log_softmax(-1) for ids in data]

    def distance(way: object) -> float:
        made = qpass.quantize(small_model(name), way, progress=False)
        got = [output_of(made, ids).log_softmax(-1) for ids in data]
        return sum(float((w.exp() * (w - g)).sum(-1).mean()) for w, g in zip(wanted, got, strict=True))

    assert distance(recipe) < distance(PRESETS["w4a16"].with_group_size(32))


def test_weights_of_one_set_of_experts_share_a_scheme() -> None:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2)).eval()
    recipe = qpass.search(model, "5 bits", data=tokens(8, 32), schemes=SCHEMES[:3], progress=False)
    chosen: dict[object, set[object]] = {}
    for decision in qpass.plan(model, recipe).decisions:
        if decision.site.experts is not None:
            chosen.setdefault(decision.site.experts, set()).add(decision.scheme)
    assert len(chosen) == 2 and all(len(schemes) == 1 for schemes in chosen.values())


def test_costs_follow_the_measured_divergence() -> None:
    from qpass.budget.costs import costs
    from qpass.calibrate.samples import read_samples

    model, data = small_model("llama"), tokens(48, 24)
    decisions = {scheme.name: [d for d in qpass.plan(model, scheme).decisions if d.status == "quantize"]
                 for scheme in SCHEMES}
    groups = groups_of(decisions[SCHEMES[1].name])
    found = costs(model, decisions, groups, read_samples(data, model, max_seq_length=24), 0,
                  lambda text: None).nats
    wanted = [output_of(model, ids).log_softmax(-1) for ids in data[:16]]
    ratios = []
    for index, group in enumerate(groups):
        for scheme in SCHEMES[1:3]:
            recipe = qpass.Recipe(None, overrides={name: scheme for name in group})
            made = qpass.quantize(small_model("llama"), recipe, progress=False)
            got = [output_of(made, ids).log_softmax(-1) for ids in data[:16]]
            kl = sum(float((w.exp() * (w - g)).sum(-1).mean()) for w, g in zip(wanted, got, strict=True)) / 16
            ratios.append(found[index, scheme.name] / kl)
    assert 0.4 < sorted(ratios)[len(ratios) // 2] < 2.5
    assert all(found[index, SCHEMES[0].name] > found[index, SCHEMES[2].name] for index in range(len(groups)))


def test_tokens_per_second() -> None:
    model = small_model("llama")
    recipe = qpass.search(model, "1 token/s", data=tokens(2, 16), schemes=SCHEMES[1:2], progress=False)
    assert recipe.scheme is None or all(rule.scheme is None for rule in recipe.overrides)
    with pytest.raises(RecipeError, match=r"tokens per second cannot be met|is below"):
        qpass.search(model, "1000000000 tokens/s", data=tokens(2, 16), schemes=SCHEMES[1:2], progress=False)
