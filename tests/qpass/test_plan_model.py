"""Plan: a dry run on real and meta models; rows, totals, JSON and HTML agree, and the model is untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import LayerRefused, UnmatchedRule
from qpass.plan_model import Plan, make_plan
from qpass.recipes.recipe import Recipe

Build = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def plan() -> Plan:
    from tests.conftest import build_model

    return make_plan(build_model("tied_llama", dtype=torch.bfloat16, device="meta"),
                     {"scheme": "w4a8", "overrides": {"*.1.mlp.*": "w8a8", "*.o_proj": None}})


def test_rows_say_what_happens(plan: Plan) -> None:
    rows = {row.name: row for row in plan.rows}
    assert len(rows) == len(plan.rows) == len(plan.decisions) == 16
    q, up, o = (rows[f"model.layers.{i}.{leaf}.weight"] for i, leaf in (
        (0, "self_attn.q_proj"), (1, "mlp.up_proj"), (0, "self_attn.o_proj")))
    assert (q.status, q.rule, q.scheme) == ("quantize", "recipe w4a8", "w4a8")
    assert (q.effective, q.group_size) == ("w4a8 g64", 64)
    assert q.reason == "group 128 does not divide 64: adjusted to 64" and q.kernel
    assert (up.rule, up.scheme, up.effective) == ("*.1.mlp.* = w8a8", "w8a8", "w8a8 channel")
    assert (o.status, o.rule, o.scheme, o.kernel) == ("keep", "*.o_proj = float", None, None)
    assert q.shared_input is not None and q.shared_input == rows["model.layers.0.self_attn.v_proj.weight"].shared_input
    assert q.produced_by is not None and "input_layernorm" in q.produced_by
    assert rows["lm_head.weight"].reason.startswith("tied to model.embed_tokens.weight")
    assert rows["model.embed_tokens.weight"].kind == "embedding"


def test_totals_add_up(plan: Plan) -> None:
    totals = plan.totals
    assert (totals.quantized, totals.kept, totals.refused) == (12, 4, 0)
    assert totals.bytes_before == sum(row.bytes_before for row in plan.rows)
    assert totals.bytes_after < totals.bytes_before and 4 < totals.bits_per_weight < 9


def test_table_has_a_line_for_a_pattern(plan: Plan) -> None:
    text = str(plan)
    assert "model.layers.{0,1}.self_attn.q_proj.weight" in text and "default ignore lm_head" in text
    assert "12 to quantize" in text and max(map(len, text.splitlines())) <= 170
    assert len(plan.table(full=True).splitlines()) > len(text.splitlines())


def test_json_and_html(plan: Plan, tmp_path: Path) -> None:
    data = json.loads(plan.to_json())
    assert Recipe.from_dict(data["recipe"]) == plan.recipe
    assert [row["name"] for row in data["rows"]] == [row.name for row in plan.rows]
    assert data["totals"]["quantized"] == 12 and data["capture_method"] == plan.capture_method
    page = plan.to_html(tmp_path / "plan.html").read_text()
    assert all(row.name in page for row in plan.rows)


def test_plan_touches_nothing(tiny_llama: Build, token_ids: torch.Tensor) -> None:
    model = tiny_llama()
    before = {name: (id(p), p._version, p.clone()) for name, p in model.named_parameters()}
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    keys, expected = set(vars(model)), model(token_ids).logits
    assert qpass.plan(model, "w4a8").totals.quantized == 14
    assert set(vars(model)) == keys
    assert [type(m) for m in model.modules()] == classes and [m.training for m in model.modules()] == modes
    for name, p in model.named_parameters():
        assert (id(p), p._version) == before[name][:2] and torch.equal(p, before[name][2])
    assert torch.equal(model(token_ids).logits, expected)


def test_meta_and_real_models_get_one_plan(tiny_model: Build) -> None:
    assert make_plan(tiny_model("llama", device="meta"), "w8a8").rows == make_plan(tiny_model("llama"), "w8a8").rows


def test_transposed_weights_are_planned(tiny_model: Build) -> None:
    rows = make_plan(tiny_model("gpt2", device="meta"), "w8a8").rows
    fc = next(row for row in rows if row.name.endswith("0.mlp.c_fc.weight"))
    assert fc.status == "quantize" and fc.shape == (64, 128)


def test_a_rule_that_other_rules_beat_everywhere_is_noted(tiny_model: Build) -> None:
    made = make_plan(tiny_model("llama", device="meta"),
                     Recipe("w4a8", overrides={"*.q_proj": "w8a8", "re:.*q_proj": "w8a16"}))
    assert [n for n in made.notes if "decides no layer" in n] == [
        "rule 're:.*q_proj = w8a16' decides no layer: other rules decide each that it matches"]


def test_errors_come_before_anything_else(tiny_model: Build) -> None:
    model = tiny_model("llama", device="meta")
    with pytest.raises(UnmatchedRule, match=r"closest: .*q_proj"):
        qpass.plan(model, Recipe("w4a8", overrides={"q_prj": "w8a8"}))
    with pytest.raises(LayerRefused, match=r"model\.layers\.\{0,1\}\.self_attn\.q_proj\.weight: group 128"):
        qpass.plan(model, Recipe("w4a8", on_indivisible="error"))
    with pytest.raises(LayerRefused, match="it is multiplied inside"):
        qpass.plan(Recurrent(), Recipe("w4a8", overrides={"gru": "w8a8"}), example_inputs=torch.zeros(1, 3, 32))


class Recurrent(nn.Module):
    """A Linear, and products that nothing can replace."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gru = nn.Linear(32, 64), nn.GRU(64, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.up(x))[0]  # type: ignore[no-any-return]


def test_refused_products_are_rows_with_a_sentence() -> None:
    rows = {row.name: row for row in make_plan(Recurrent(), "w8a8", example_inputs=torch.zeros(1, 3, 32)).rows}
    assert rows["up.weight"].status == "quantize"
    assert rows["gru.weight_ih_l0"].status == "refuse" and "gru" in rows["gru.weight_ih_l0"].reason


def test_a_plan_says_what_quantize_will_need() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    plan = make_plan(model, {"scheme": "w8a8", "algorithms": ["gptq"]})
    assert any("gptq needs data" in note for note in plan.notes)


def test_no_rule_is_advised_for_what_cannot_be_packed() -> None:
    """A head that is refused: no rule would make it smaller."""
    model = nn.Sequential(nn.Linear(64, 64), torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    plan = qpass.plan(model, qpass.Recipe("w8a8", ignore=()))
    assert [row.status for row in plan.rows].count("refuse") == 1
    assert not any("a rule" in note for note in plan.notes)


def test_without_a_graph_no_layer_is_called_unreached() -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("as a forward may")

    plan = qpass.plan(Raises(), "w8a8", example_inputs=torch.zeros(2, 64))
    assert [(row.status, row.reason) for row in plan.rows] == [("quantize", "")]
    assert "there was no graph" in str(plan)
    said = [note for note in plan.notes if "as a forward may" in note]
    assert [note.partition(" ")[0] for note in said] == ["trace", "export", "dynamo"]  # a second trace said the same
