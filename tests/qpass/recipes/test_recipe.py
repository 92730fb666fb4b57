"""Recipe: survives the way through plain data, and refuses at construction what cannot mean anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpass.errors import RecipeError
from qpass.recipes.recipe import Recipe, Rule, as_scheme, scheme_to_data
from qpass.scheme import PRESETS, ActivationArgs, Scheme, WeightArgs, preset

_names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not text.startswith("re:"))
_weights = st.one_of(
    st.builds(WeightArgs, bits=st.integers(2, 8), granularity=st.sampled_from(["per_tensor", "per_channel"]),
              symmetric=st.booleans()),
    st.builds(WeightArgs, bits=st.integers(2, 8), granularity=st.just("per_group"),
              group_size=st.integers(1, 4096), symmetric=st.booleans()))
_schemes = st.one_of(st.sampled_from(list(PRESETS.values())), st.builds(
    Scheme, name=_names, weight=_weights,
    activation=st.one_of(st.none(), st.builds(ActivationArgs, symmetric=st.booleans()))))
_algorithms = st.sampled_from([(), ("gptq",), ({"smoothquant": {"alpha": 0.8}}, "gptq"), (
    {"gptq": {"targets": ["*.mlp.*"], "actorder": None}}, {"scales": None})])
_recipes = st.builds(
    Recipe, st.one_of(st.none(), _schemes), ignore=st.one_of(st.none(), st.lists(_names, max_size=3)),
    overrides=st.dictionaries(_names, st.one_of(st.none(), _schemes), max_size=3),
    algorithms=_algorithms, on_indivisible=st.sampled_from(["adjust", "skip", "error"]),
    strict=st.booleans())


@given(_recipes)
def test_round_trip_through_json(recipe: Recipe) -> None:
    data = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(data) == recipe
    assert Recipe.from_dict(data).to_dict() == recipe.to_dict()
    assert hash(Recipe.from_dict(data)) == hash(recipe)


def test_presets_are_written_by_name_and_everything_else_in_full() -> None:
    assert scheme_to_data(preset("w4a8")) == "w4a8"
    own = scheme_to_data(preset("w4a8").with_group_size(64))
    assert isinstance(own, dict) and own["weight"]["group_size"] == 64
    # a preset's name on other numbers must not come back as the preset
    impostor = Scheme(name="w4a8", weight=WeightArgs(bits=8))
    assert as_scheme(scheme_to_data(impostor)) == impostor


def test_defaults() -> None:
    assert Recipe("w4a8").to_dict() == {"scheme": "w4a8", "ignore": None, "overrides": {}, "algorithms": [],
                                        "on_indivisible": "adjust", "on_unsupported_activation": "keep",
                                        "strict": False}
    assert Recipe.from_dict({"scheme": "W4A8"}) == Recipe("w4a8")


def test_overrides_as_rules_or_as_a_mapping() -> None:
    rules = [Rule(target="*.mlp.*", scheme=preset("w8a8")), Rule(target="lm_head", scheme=None)]
    assert Recipe("w4a8", overrides=rules) == Recipe("w4a8", overrides={"*.mlp.*": "w8a8", "lm_head": None})
    assert [str(rule) for rule in rules] == ["*.mlp.* = w8a8", "lm_head = float"]


@pytest.mark.parametrize(("fields", "message"), [
    ({"scheme": "w4a9"}, "closest: w4a8"),
    ({"scheme": 4}, "not a scheme: 4"),
    ({"ignore": "lm_head"}, "ignore must be a list"),
    ({"ignore": [3]}, "must hold names, got 3"),
    ({"ignore": [""]}, "needs a target"),
    ({"ignore": ["re:("]}, "not a regular expression"),
    ({"algorithms": "gptq"}, "algorithms must be a list"),
    ({"algorithms": ["gptk"]}, "no algorithm is named 'gptk'; closest: gptq"),
    ({"algorithms": [{"gptq": {"damp": 1}}]}, "unknown setting 'damp' of algorithm gptq; allowed: targets"),
    ({"algorithms": [{"gptq": {"block_size": 0}}]}, "block_size of algorithm gptq must be positive, got 0"),
    ({"algorithms": [{"gptq": {"targets": "lm_head"}}]}, "must be a list of targets"),
    ({"algorithms": [{"gptq": {}, "scales": {}}]}, "a name or {name: settings}"),
    ({"algorithms": ["gptq", "gptq"]}, "listed twice"),
    ({"overrides": ["lm_head"]}, "must hold Rule objects"),
    ({"overrides": "lm_head"}, "must map targets to schemes"),
    ({"overrides": {"": "w8a8"}}, "needs a target"),
    ({"overrides": {"re:[": None}}, "not a regular expression"),
    ({"overrides": {"a": "w8a9"}}, "closest"),
    ({"overrides": [Rule(target="a", scheme=None), Rule(target="a", scheme=preset("w8a8"))]}, "two overrides"),
    ({"on_indivisible": "pad"}, "'adjust', 'skip' or 'error', got 'pad'"),
    ({"strict": "yes"}, "strict must be True or False"),
    ({"schema": "w4a8"}, "unknown recipe key 'schema'; allowed: scheme, ignore, overrides"),
    ({"scheme": {"name": "x"}}, "has no 'weight'"),
    ({"scheme": {"name": "x", "weight": {"group_size": 4}}}, "has no 'bits'"),
    ({"scheme": {"name": "x", "weight": {"bits": 4, "grp": 4}}}, "unknown key 'grp'.*allowed: bits"),
    ({"scheme": {"name": "x", "weight": 4}}, "must be a mapping"),
    ({"scheme": {"name": "x", "weight": {"bits": 4}, "act": 8}}, "unknown key 'act'"),
    ({"scheme": {"name": "x", "weight": {"bits": 4}, "activation": {"bits": 8, "dyn": True}}}, "unknown key 'dyn'"),
    ({"scheme": {"name": "x", "weight": {"bits": 4, "type": "posit"}}}, "nothing defines"),
], ids=lambda value: str(value)[:40])
def test_what_cannot_mean_anything_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({"scheme": "w4a8", **fields})


def test_a_rule_needs_a_scheme_object() -> None:
    with pytest.raises(RecipeError, match="needs a Scheme or None"):
        Rule(target="a", scheme="w4a8")  # type: ignore[arg-type]


def test_recipes_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Recipe("w4a8").strict = True  # type: ignore[misc]
