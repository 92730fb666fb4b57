"""Decide: what happens to every kind of site, with group sizes, ties, policies, errors and bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpass.decide.decide_sites import decide
from qpass.decide.decision import Decision
from qpass.errors import LayerRefused, NoKernel, NothingQuantized
from qpass.kernels.registry import KERNELS, force_kernel
from qpass.recipes.recipe import Recipe
from qpass.scheme import PRESETS, Scheme, preset
from qpass.site import Site
from qpass.spec import LinearSpec, effective_text

CPU = torch.device("cpu")


def site(owner: str, n: int = 64, k: int = 128, **fields: Any) -> Site:
    facts = {"kind": "linear", "shape": (n, k), "dtype": torch.bfloat16, "owner_class": "Linear", **fields}
    return Site(name=f"{owner}.weight", owner=owner, **facts)


def one(found: Site, recipe: Recipe) -> Decision:
    """The decision on one site beside another that is surely quantized."""
    return decide([found, site("sure", 8, 4096)], recipe, device=CPU)[0]


def table(**fields: Any) -> Site:
    return site("embed", 100, 64, kind="embedding", owner_class="Embedding", **fields)


def test_a_quantized_site() -> None:
    found = one(site("up"), Recipe("w4a8"))
    assert (found.status, found.rule, found.scheme, found.reason) == ("quantize", "recipe w4a8", preset("w4a8"), "")
    assert found.spec is not None and found.spec.weight == preset("w4a8").weight
    assert (found.spec.out_features, found.spec.in_features, found.spec.family) == (64, 128, "w4a8")
    assert found.spec.kernel in KERNELS
    assert found.bytes_before == 64 * 128 * 2 and found.bytes_after == 64 * 128 // 2 + 64 * 2


def test_a_transposed_site_has_its_rows_in_columns() -> None:
    found = one(site("c_fc", 48, 640, transposed=True), Recipe("w4a8"))  # stored [K=48, N=640]
    assert found.spec is not None
    assert (found.spec.out_features, found.spec.in_features, found.spec.group_size) == (640, 48, 48)


@pytest.mark.parametrize(("k", "asked", "got"), [
    (576, 128, 64), (1536, 128, 128), (64, 128, 64), (32, 128, 32), (96, 64, 32), (192, 128, 64), (4096, 4096, 4096),
    (768, 512, 256), (200, 100, 100),
])
def test_adjust_takes_the_largest_power_of_two_that_divides(k: int, asked: int, got: int) -> None:
    found = one(site("up", 8, k), Recipe(preset("w4a8").with_group_size(asked), overrides={"sure": "w8a8"}))
    assert found.spec is not None and found.spec.weight.group_size == found.spec.group_size == got
    assert found.reason == ("" if got == asked else f"group {asked} does not divide {k}: adjusted to {got}")
    assert found.scheme == preset("w4a8").with_group_size(asked)


@pytest.mark.parametrize("k", [1, 7, 31, 33, 100, 16, 577])
def test_adjust_takes_one_group_a_row_where_no_power_divides(k: int) -> None:
    found = one(site("up", 8, k), Recipe("w4a8"))
    assert found.spec is not None and found.spec.weight.granularity == "per_channel"
    assert found.spec.group_size == k
    assert found.reason == (f"group 128 does not divide {k}, nor does any power of two from 32 to 128: "
                            "adjusted to one group a row")


@given(st.integers(1, 20000), st.integers(1, 512),
       st.sampled_from(sorted(name for name, scheme in PRESETS.items() if scheme.weight.type == "int")))
def test_adjusted_groups_always_divide(k: int, size: int, name: str) -> None:
    found = one(site("up", 3, k), Recipe(preset(name).with_group_size(size), overrides={"sure": "w8a8"}))
    assert found.spec is not None and found.spec.in_features % found.spec.group_size == 0
    powers = [p for p in (32, 64, 128, 256, 512) if p <= size and k % p == 0]
    expected = size if k % size == 0 else max(powers, default=k)
    assert found.spec.group_size == expected
    assert ("adjusted to" in found.reason) == (expected != size)
    activation = PRESETS[name].activation
    assert ("activation kept in" in found.reason) == (activation is not None and activation.number != "int8")
    assert LinearSpec.parse(str(found.spec)) == found.spec


def test_skip_leaves_the_layer_in_float_and_says_so() -> None:
    found = one(site("up", 8, 576), Recipe("w4a8", on_indivisible="skip"))
    assert (found.status, found.spec, found.bytes_after) == ("keep", None, found.bytes_before)
    assert found.reason == "group 128 does not divide 576: left in float, as on_indivisible='skip' says"


def test_error_lists_every_indivisible_layer_at_once() -> None:
    sites = [site(f"layers.{i}.up", 8, 576) for i in range(40)] + [site("odd", 8, 100), site("fine", 8, 256)]
    with pytest.raises(LayerRefused) as caught:
        decide(sites, Recipe("w4a8", on_indivisible="error"), device=CPU)
    text = str(caught.value)
    assert "layers.{0..39}.up.weight: group 128 does not divide 576" in text
    assert "odd.weight: group 128 does not divide 100" in text and "fine" not in text
    assert decide(sites[:1], Recipe("w8a8", on_indivisible="error"), device=CPU)[0].status == "quantize"


def test_embeddings_stay_float_with_a_reason() -> None:
    found = one(table(), Recipe("w4a8"))
    assert (found.status, found.spec) == ("keep", None) and "looked up, not multiplied" in found.reason
    assert one(table(), Recipe("w4a8", overrides={"embed*": "w8a8"})).status == "keep"
    assert one(table(), Recipe("w4a8", overrides={"embedding": "w8a8"})).status == "refuse"
    assert one(table(), Recipe("w4a8", ignore=["embed"])).reason == ""
    with pytest.raises(LayerRefused, match=r"embed.weight: embeddings are looked up"):
        one(table(), Recipe("w4a8", overrides={"embed": "w8a8"}))


@pytest.mark.parametrize("told_by", ["head", "table", "both"])
def test_a_tied_head_is_said_to_be_tied(told_by: str) -> None:
    embed = table(aliases=("lm_head.weight",) if told_by != "head" else ())
    head = site("lm_head", 100, 64, aliases=("embed.weight",) if told_by != "table" else ())
    kept = decide([embed, head, site("up")], Recipe("w4a8"), device=CPU)
    assert (kept[1].status, kept[1].rule) == ("keep", "default ignore lm_head")
    assert kept[1].reason == "tied to embed.weight: one parameter, counted there"
    assert sum(d.bytes_before for d in kept) == (100 * 64 + 64 * 128) * 2
    asked = decide([embed, head, site("up")], Recipe("w4a8", ignore=[]), device=CPU)
    assert [d.status for d in asked] == ["quantize"] * 3
    assert (asked[0].spec, asked[0].bytes_after) == (asked[1].spec, 0) and asked[0].rule == asked[1].rule
    assert asked[0].reason == "tied to lm_head.weight: its rows are read from the packed head"
    assert (asked[0].bytes_before, asked[1].bytes_before) == (100 * 64 * 2, 0)
    assert (asked[0].bytes_a_token, asked[1].bytes_a_token) == (asked[1].bytes_after // 100, asked[1].bytes_after)
    stuck = replace(head, swap=None, refusal="lm_head.weight is tied")
    left = decide([embed, stuck, site("up")], Recipe("w4a8", ignore=[]), device=CPU)[1]
    assert left.status == "refuse" and "add it to ignore, or untie" in left.reason
    with pytest.raises(LayerRefused, match=r"tied to embed\.weight"):
        decide([embed, stuck, site("up")], Recipe("w4a8", overrides={"lm_head": "w8a8"}), device=CPU)


def test_two_linears_that_share_a_weight_are_not_a_tied_head() -> None:
    found = decide([table(), site("a", aliases=("b.weight",))], Recipe("w4a8"), device=CPU)
    assert found[1].status == "quantize"


@pytest.mark.parametrize(("fields", "reason"), [
    ({"swap": None, "refusal": "bad.weight is inside a scan; open it"}, "it is inside a scan; open it"),
    ({"swap": None, "refusal": "bad.weight: no kernel"}, "no kernel"),
    ({"swap": None}, "a product inside Linear cannot be replaced"),
    ({"dtype": torch.int8}, "its weight is torch.int8"),
    ({"dtype": torch.float8_e4m3fn}, "its weight is torch.float8_e4m3fn"),
    ({"shape": (0, 64)}, "holds no numbers"),
    ({"shape": (64, 0)}, "holds no numbers"),
], ids=str)
def test_what_cannot_be_quantized_is_refused_with_a_sentence(fields: dict[str, Any], reason: str) -> None:
    found = one(site("bad", **fields), Recipe("w4a8"))
    assert (found.status, found.spec) == ("refuse", None)
    assert found.reason.startswith(reason) or reason in found.reason
    assert found.bytes_after == found.bytes_before
    assert one(site("bad", **fields), Recipe("w4a8", overrides={"ba?": "w8a8"})).status == "refuse"
    assert one(site("bad", **fields), Recipe("w4a8", ignore=["bad"])).status == "keep"
    with pytest.raises(LayerRefused, match=r"a rule names layers that cannot be quantized:\n  bad.weight"):
        one(site("bad", **fields), Recipe("w4a8", overrides={"bad": "w8a8"}))


def test_strict_refuses_what_stays_float_unless_it_is_ignored() -> None:
    sites = [table(), site("lm_head"), site("up"), site("bad", swap=None, refusal="no"), site("odd", 8, 100)]
    assert [d.status for d in decide(sites, Recipe("w4a8", strict=True, ignore=["lm_head", "bad"]), device=CPU)] == [
        "keep", "keep", "quantize", "keep", "quantize"]
    with pytest.raises(LayerRefused, match=r"strict=True.*\n  bad.weight: no\n  odd.weight: group 128"):
        decide(sites, Recipe("w4a8", strict=True, on_indivisible="skip"), device=CPU)
    with pytest.raises(LayerRefused, match=r"up.weight: recipe float"):
        decide([site("up"), site("down")], Recipe(None, overrides={"down": "w8a8"}, strict=True), device=CPU)


def test_nothing_quantized_groups_the_reasons() -> None:
    sites = [table(), site("lm_head"), *(site(f"l.{i}", swap=None, refusal="closed") for i in range(5))]
    with pytest.raises(NothingQuantized) as caught:
        decide(sites, Recipe("w4a8"), device=CPU)
    for part in ("5 refused by 'recipe w4a8': closed", "1 kept by 'default ignore lm_head'", "overrides="):
        assert part in str(caught.value)
    with pytest.raises(NothingQuantized, match="no product of an activation"):
        decide([], Recipe("w4a8"), device=CPU)


def test_sites_never_reached_are_quantized_and_told() -> None:
    found = one(site("dead", 8, 576, uses=0), Recipe("w4a8"))
    assert found.reason == "group 128 does not divide 576: adjusted to 64; the example inputs never reached it"


def test_kernels_and_refusals_come_from_the_registry() -> None:
    found = one(site("up", 8, 576), Recipe("w3a8")).spec
    assert found is not None and KERNELS[found.kernel].serves(found.family)
    with force_kernel("linear_reference"):
        forced = one(site("up"), Recipe("w4a8"))
    assert forced.spec is not None and forced.spec.kernel == "linear_reference" and forced.refusals == {}
    wrong = next((k.name for k in KERNELS.values() if k.scheme == "w4a8" and k.op == "linear"), None)
    if wrong is not None:
        with force_kernel(wrong), pytest.raises(NoKernel, match=f"'{wrong}' was forced but refuses up.weight"):
            one(site("up"), Recipe("w8a8"))


def spec(name: str | Scheme, n: int, k: int) -> LinearSpec:
    scheme = preset(name) if isinstance(name, str) else name
    return LinearSpec(family=scheme.family, weight=scheme.weight, activation=scheme.activation, out_features=n,
                      in_features=k)


def test_effective_text() -> None:
    assert [effective_text(spec(name, 8, 128)) for name in ("w4a8", "w8a8", "w4a16_asym", "w4a8_channel")] == [
        "w4a8 g128", "w8a8 channel", "w4a16 g128 asym", "w4a8 channel, x asym"]
    assert effective_text(spec("w4a8_int_scales", 8, 128)) == "w4a8 g128 integer scales"
    assert [effective_text(spec(name, 8, 128)) for name in ("w8a8_static_asym", "w4afp8")] == [
        "w8a8 channel, x static asym", "w4afp8 g128"]


@pytest.mark.parametrize(("overrides", "status"), [
    ({}, "keep"), ({"linear": "w8a8"}, "keep"), ({"Linear": "w8a8"}, "keep"), ({"up": "w8a8"}, "keep"),
    ({"mlp.gate": "w8a8"}, "quantize"), ({"gate": "w8a8"}, "quantize"), ({"*.gate": "w8a8"}, "quantize"),
    ({"re:.*gate": "w8a8"}, "quantize"), ({"mlp.gate": None}, "keep"),
], ids=str)
def test_a_router_stays_float_unless_a_rule_names_it(overrides: dict[str, str | None], status: str) -> None:
    sites = [site("mlp.gate", 8, 128, role="router"), site("up")]
    found = decide(sites, Recipe("w4a8", overrides=overrides), device=CPU)[0]
    assert found.status == status
    assert ("a router: its result picks experts" in found.reason) == (status == "keep" and "mlp.gate" not in overrides)
    with pytest.raises(LayerRefused, match=r"mlp\.gate\.weight: a router"):
        decide([sites[0], site("up")], Recipe("w4a8", strict=True), device=CPU)


def test_a_router_of_its_own_class_is_named_by_it() -> None:
    router = site("mlp.gate", 8, 128, role="router", owner_class="TopRouter")
    assert one(router, Recipe("w4a8")).status == "keep"
    assert one(router, Recipe("w4a8", overrides={"TopRouter": "w8a8"})).status == "quantize"
