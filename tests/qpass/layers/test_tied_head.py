"""Tied head: packed once, multiplied by the head, looked up by the embedding; saved untied, tied when loaded."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import CheckpointError, PackedForInference
from qpass.kernels.registry import force_kernel
from qpass.layers.packed_layers import QuantLinear
from qpass.layers.tied_table import TiedTable

HEADS = ("w8a16", "w4a16", "w8a8", "w4a8", "w4a16_asym")


def quantized(model: nn.Module, head: str, scheme: str | None = "w4a8") -> Any:
    return qpass.quantize(model, qpass.Recipe(scheme, overrides={"lm_head": head}), progress=False)


@pytest.mark.parametrize("kernel", ["native", "linear_reference"])
@pytest.mark.parametrize("head", HEADS)
def test_embedding_reads_rows_of_the_packed_head(tiny_model: Any, token_ids: Tensor, head: str, kernel: str) -> None:
    model = tiny_model("tied_llama", dtype=torch.bfloat16, hidden_size=96, vocab_size=131)
    if kernel == "native":
        quantized(model, head)
    else:
        with force_kernel(kernel):
            quantized(model, head)
    assert isinstance(model.lm_head, QuantLinear) and isinstance(model.model.embed_tokens.weight, TiedTable)
    assert type(model.model.embed_tokens) is nn.Embedding and not any(p is not None and p.shape[0] == 131
                                                                      for p in model.parameters())
    every = torch.arange(131)
    want = model.lm_head.dequantize(torch.bfloat16)
    assert torch.equal(model.model.embed_tokens(every), want)
    assert torch.equal(model.model.embed_tokens(token_ids), want[token_ids])
    assert model.model.embed_tokens(token_ids[:0]).shape == (0, 9, 96)
    assert model(token_ids).logits.shape == (2, 9, 131)
    assert model.config.tie_word_embeddings is False


def test_compiled_without_a_break_equals_eager(tiny_model: Any, token_ids: Tensor) -> None:
    model = quantized(tiny_model("tied_llama", num_hidden_layers=1), "w8a8")
    with torch.no_grad():
        eager = model(token_ids).logits
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(token_ids).logits, eager, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(compiled(token_ids[:, :5]).logits, eager[:, :5], rtol=1e-3, atol=1e-3)


def test_saved_untied_and_loaded_tied(tiny_model: Any, token_ids: Tensor, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = quantized(tiny_model("tied_llama"), "w4a16", "w8a8")
    expected = model(token_ids).logits
    qpass.save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], model.lm_head.dequantize())
    assert "lm_head.weight_packed" in tensors and "lm_head.weight" not in tensors
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["qpass"]["tied"] == {"model.embed_tokens.weight": "lm_head"}
    again: Any = qpass.load(tmp_path / "m")
    assert isinstance(again.model.embed_tokens.weight, TiedTable)
    assert again.model.embed_tokens.weight.packed[0] is again.lm_head.packed[0]
    assert torch.equal(again(token_ids).logits, expected)
    state = model.state_dict()
    assert set(state) == set(tensors)
    again.load_state_dict(state)
    assert torch.equal(again(token_ids).logits, expected)
    file = tmp_path / "m" / "config.json"
    config["quantization_config"]["qpass"]["tied"] = {"model.embed_tokens.weight": "model.norm"}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"ties model\.embed_tokens\.weight to model\.norm"):
        qpass.load(tmp_path / "m")


def test_dequantize_ties_again_and_copies_and_casts_work(tiny_model: Any, token_ids: Tensor) -> None:
    model = quantized(tiny_model("tied_llama"), "w8a16")
    expected = model(token_ids).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(token_ids).logits, expected)
    assert other.model.embed_tokens.weight.packed[0] is other.lm_head.packed[0] is not model.lm_head.packed[0]
    assert other.bfloat16()(token_ids).logits.dtype == torch.bfloat16
    qpass.dequantize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and isinstance(model.lm_head.weight, nn.Parameter)
    assert model.config.tie_word_embeddings is True
    qpass.quantize(model, "w4a8", progress=False)  # and it is a model like any other
    assert isinstance(model.lm_head.weight, nn.Parameter)


def test_plan_and_report_count_it_once(tiny_model: Any) -> None:
    model = tiny_model("tied_llama", dtype=torch.bfloat16)
    floating = qpass.plan(model, "w4a8")
    table, head = 128 * 64 * 2, 128 * 64 + 128 * 2
    rows = {row.name: row for row in floating.rows}
    assert (rows["lm_head.weight"].bytes_after, rows["lm_head.weight"].bytes_a_token) == (0, table)
    assert (rows["model.embed_tokens.weight"].bytes_after, rows["model.embed_tokens.weight"].bytes_a_token) == (
        table, 128)
    (told,) = [note for note in floating.notes if note.startswith("lm_head.weight in float")]
    assert "a rule lm_head = w8a16 would make it 8.2 KiB" in told and told in str(floating)
    packed = qpass.plan(model, qpass.Recipe("w4a8", overrides={"lm_head": "w8a8"}))
    assert packed.totals.bytes_before == floating.totals.bytes_before
    assert packed.totals.bytes_after == floating.totals.bytes_after - table + head
    assert packed.totals.bytes_a_token == floating.totals.bytes_a_token - table - 128 + head + head // 128
    assert not any("in float is" in note for note in packed.notes)
    quantized(model, "w8a8")
    rows = {row.name: row for row in qpass.explain(model).rows}  # type: ignore[assignment]
    assert rows["model.embed_tokens.weight"].reason == "tied to lm_head.weight: its rows are read from the packed head"
    assert rows["model.embed_tokens.weight"].bytes_after == 0 and rows["lm_head.weight"].bytes_after > 0


class _Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.table = nn.Embedding(64, 64, max_norm=1.0)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)))  # type: ignore[no-any-return]


def test_a_table_that_changes_itself_is_refused() -> None:
    recipe = qpass.Recipe("w8a8", ignore=[])
    plan = qpass.plan(_Renormed(), recipe, example_inputs=torch.arange(3)).rows
    assert {row.name: row.status for row in plan}["head.weight"] == "refuse"
    model = _Renormed()
    model.table.max_norm = None
    qpass.quantize(model, recipe, example_inputs=torch.arange(3), progress=False)
    model.table.max_norm = 1.0
    with pytest.raises(PackedForInference, match="embedding"):
        model(torch.arange(3))


def test_compare_and_evaluate_pass_over_the_table(tiny_model: Any, token_ids: Tensor) -> None:
    reference = tiny_model("tied_llama")
    model = quantized(tiny_model("tied_llama"), "w8a8")
    names = [row.name for row in qpass.compare(reference, model, {"input_ids": token_ids}).rows]
    assert "lm_head" in names and "model.embed_tokens.weight" not in names
