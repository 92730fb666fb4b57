"""Match: each way to read a target, which of them wins, and what is said of rules that match nothing or disagree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpass.decide.match import Tier, match
from qpass.errors import RuleConflict, UnmatchedRule
from qpass.recipes.recipe import Recipe
from qpass.site import Site


def site(owner: str, parameter: str = "weight", **fields: Any) -> Site:
    facts = {"kind": "linear", "shape": (64, 128), "dtype": torch.bfloat16, "owner_class": "Linear", **fields}
    return Site(name=f"{owner}.{parameter}" if owner else parameter, owner=owner, **facts)


def model() -> list[Site]:
    layers = [site(f"model.layers.{i}.{leaf}") for i in range(3)
              for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")]
    return [site("model.embed_tokens", kind="embedding", owner_class="Embedding"), *layers,
            *(site("model.layers.2.mlp.experts", leaf, kind="experts", owner_class="Experts", shape=(4, 64, 64))
              for leaf in ("gate_up_proj", "down_proj")),
            site("head.proj", owner_class="Conv1D", transposed=True), site("lm_head")]


def decided(recipe: Recipe, sites: list[Site] | None = None) -> dict[str, str]:
    """Site name -> name of its scheme, "float" if none."""
    return {m.site.name: m.scheme.name if m.scheme else "float" for m in match(sites or model(), recipe)}


def matched_by(target: str) -> set[str]:
    return {name for name, scheme in decided(Recipe("w4a8", ignore=[], overrides={target: "w8a8"})).items()
            if scheme == "w8a8"}


def test_exact_module_path_stands_for_the_parameters_it_owns() -> None:
    assert matched_by("model.layers.1.mlp.up_proj") == {"model.layers.1.mlp.up_proj.weight"}
    assert matched_by("model.layers.2.mlp.experts") == {"model.layers.2.mlp.experts.gate_up_proj",
                                                        "model.layers.2.mlp.experts.down_proj"}


def test_exact_parameter_name() -> None:
    assert matched_by("model.layers.2.mlp.experts.down_proj") == {"model.layers.2.mlp.experts.down_proj"}


def test_glob_crosses_dots_and_sees_module_and_parameter() -> None:
    assert matched_by("*.layers.1.*") == {f"model.layers.1.{leaf}.weight" for leaf in (
        "self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")}
    assert len(matched_by("*.q_proj")) == 3 and len(matched_by("*.q_proj.weight")) == 3
    assert matched_by("model.layers.[01].mlp.u?_proj") == {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}


def test_regex_matches_from_the_start_of_module_or_parameter() -> None:
    assert len(matched_by(r"re:.*\.(q|k)_proj$")) == 6
    assert matched_by(r"re:model\.layers\.0\.mlp\.up") == {"model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(UnmatchedRule):
        matched_by("re:up_proj")


def test_class_and_kind() -> None:
    assert matched_by("Conv1D") == {"head.proj.weight"}
    assert len(matched_by("Linear")) == 13
    assert len(matched_by("linear")) == 14
    assert len(matched_by("experts")) == 2
    assert matched_by("embedding") == {"model.embed_tokens.weight"}


def test_last_component_where_no_exact_path_fits() -> None:
    assert len(matched_by("q_proj")) == 3
    assert matched_by("gate_up_proj") == {"model.layers.2.mlp.experts.gate_up_proj"}
    nested = [site("inner.lm_head"), site("inner.up")]
    assert decided(Recipe("w4a8"), nested) == {"inner.lm_head.weight": "float", "inner.up.weight": "w4a8"}
    # an exact path hides the same last component elsewhere
    both = [site("lm_head"), site("draft.lm_head")]
    assert decided(Recipe("w4a8"), both) == {"lm_head.weight": "float", "draft.lm_head.weight": "w4a8"}


def test_other_names_of_a_tied_parameter_match_where_nothing_has_that_name() -> None:
    tied = [site("body.table", aliases=("lm_head.weight",)), site("body.up")]
    assert decided(Recipe("w4a8"), tied)["body.table.weight"] == "float"
    both = [site("table", kind="embedding", aliases=("lm_head.weight",)), site("lm_head", aliases=("table.weight",))]
    assert decided(Recipe("w4a8", overrides={"table": None}), both) == {"table.weight": "float",
                                                                        "lm_head.weight": "float"}
    rules = {m.site.name: m.rule for m in match(both, Recipe("w4a8", overrides={"table": None}))}
    assert rules == {"table.weight": "table = float", "lm_head.weight": "default ignore lm_head"}


ORDERED = {
    "model.layers.0.mlp.up_proj": "w2a16", "up_proj": "w3a16", "*.mlp.up_proj": "w4a16", r"re:.*up_proj": "w5a16",
    "Linear": "w6a16", "linear": "w7a16",
}


@pytest.mark.parametrize("dropped", range(len(ORDERED) + 1))
def test_precedence_exact_last_glob_regex_class_kind_recipe(dropped: int) -> None:
    rules = dict(list(ORDERED.items())[dropped:])
    expected = next(iter(rules.values()), "w8a16")
    for order in (rules, dict(reversed(rules.items()))):
        found = decided(Recipe("w8a16", overrides=order))
        assert found["model.layers.0.mlp.up_proj.weight"] == expected


def test_tier_and_rule_text_are_told() -> None:
    recipe = Recipe("w4a8", ignore=["re:.*q_proj"], overrides={"*.mlp.*": None})
    found = {m.site.name: m for m in match(model(), recipe)}
    assert (found["model.layers.0.self_attn.q_proj.weight"].rule, found["model.layers.0.mlp.up_proj.weight"].rule,
            found["lm_head.weight"].rule) == ("ignore re:.*q_proj", "*.mlp.* = float", "recipe w4a8")
    assert found["model.layers.0.self_attn.q_proj.weight"].tier is Tier.REGEX
    assert found["model.layers.0.mlp.up_proj.weight"].ignored and not found["lm_head.weight"].ignored
    assert not match(model(), Recipe(None))[0].ignored


def test_default_ignore_needs_no_head_and_yields_only_to_a_name() -> None:
    assert set(decided(Recipe("w4a8"), [site("up")]).values()) == {"w4a8"}
    assert decided(Recipe("w4a8"))["lm_head.weight"] == "float"
    assert decided(Recipe("w4a8", overrides={"*": "w8a8"}))["lm_head.weight"] == "float"
    assert decided(Recipe("w4a8", overrides={"lm_head": "w8a8"}))["lm_head.weight"] == "w8a8"
    assert decided(Recipe("w4a8", ignore=[]))["lm_head.weight"] == "w4a8"


def test_rules_of_one_tier_that_disagree_are_an_error_naming_both_and_the_site() -> None:
    with pytest.raises(RuleConflict) as caught:
        decided(Recipe("w4a8", overrides={"*.q_proj": "w8a8", "*.layers.1.*": "w8a16"}))
    for part in ("*.q_proj = w8a8", "*.layers.1.* = w8a16", "model.layers.1.self_attn.q_proj.weight", "glob"):
        assert part in str(caught.value)
    with pytest.raises(RuleConflict, match=r"'ignore lm_head' and by 'lm_head = w8a8'"):
        decided(Recipe("w4a8", ignore=["lm_head"], overrides={"lm_head": "w8a8"}))


def test_rules_of_one_tier_that_agree_are_no_error() -> None:
    found = decided(Recipe("w4a8", overrides={"*.q_proj": "w8a8", "*.layers.1.self_attn.*": "w8a8"}))
    assert found["model.layers.1.self_attn.q_proj.weight"] == "w8a8"


def test_a_more_exact_rule_settles_a_disagreement() -> None:
    found = decided(Recipe("w4a8", overrides={"*.q_proj": "w8a8", "*.layers.1.*": "w8a8",
                                              "*.layers.1.self_attn.q_proj": "w8a8", "Linear": "w8a16"}))
    assert found["model.layers.0.mlp.up_proj.weight"] == "w8a16"


@pytest.mark.parametrize(("recipe", "parts"), [
    ({"ignore": ["lm_hed"]}, ["ignore entry 'lm_hed'", "lm_head"]),
    ({"overrides": {"model.layers.1": None}}, ["rule 'model.layers.1'", "holds 4", "'model.layers.1.*'"]),
    ({"overrides": {"*.attn.q": None}}, ["rule '*.attn.q'", "q_proj"]),
    ({"overrides": {"re:.*up_prj": None}}, ["rule 're:.*up_prj'", "up_proj"]),
    ({"overrides": {"linaer": None}}, ["closest: ", "Linear"]),
    ({"ignore": ["zzz", "qqq"]}, ["'zzz'", "'qqq'", "Conv1D"]),
], ids=lambda value: str(value)[:40])
def test_a_rule_that_matches_nothing_names_itself_and_what_is_near(recipe: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UnmatchedRule) as caught:
        decided(Recipe("w4a8", **recipe))
    for part in parts:
        assert part in str(caught.value)


def test_a_class_stands_for_those_derived_from_it_and_the_nearest_decides() -> None:
    sites = [Site(name=f"{path}.weight", owner=path, kind="linear", shape=(8, 8), dtype=torch.float32,
                  owner_class=names[0], owner_bases=names[1:])
             for path, names in {"a": ("Linear",), "b": ("Scaled", "Linear"), "c": ("Conv1D",)}.items()]
    everywhere = match(sites, Recipe("w8a8", overrides={"Linear": None}))
    assert [found.rule for found in everywhere] == ["Linear = float", "Linear = float", "recipe w8a8"]
    nearer = match(sites, Recipe("w8a8", overrides={"Linear": None, "Scaled": "w4a8"}))
    assert [found.rule for found in nearer] == ["Linear = float", "Scaled = w4a8", "recipe w8a8"]
