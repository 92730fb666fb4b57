"""Mixtures of experts: models in small, what is measured of them in, goals, tables and README out."""

from __future__ import annotations

import json
from pathlib import Path

import moe
import pytest
import torch
from make_moe import SHAPES, Shape, float_model, tensors_of, write_gguf
from model import Outcome
from readme import section
from turns import Timing

import qpass
from qpass.layers.experts_layer import QuantExperts

SMALL = Shape(experts=4, top_k=2, ffn=64, hidden=64, layers=2, vocabulary=96, heads=4, key_heads=2)


def test_shapes_are_those_of_the_goals() -> None:
    assert [(s.experts, s.top_k, s.ffn, s.hidden, s.layers, s.vocabulary) for s in SHAPES.values()] == [
        (32, 4, 768, 2048, 16, 32000), (8, 2, 4096, 2048, 16, 32000)]


@torch.no_grad()
def test_small_models_run_and_quantize() -> None:
    model = float_model(SMALL)
    assert model(torch.tensor([[3, 5]])).logits.isfinite().all()
    one, two = (layer.mlp.experts.down_proj for layer in model.model.layers)
    assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()
    assert SMALL.float_bytes == 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    qpass.quantize(model, "w4a8_channel", progress=False)
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 2


def test_gguf_holds_every_tensor(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(SMALL, tmp_path / "m.gguf")
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(read) == {name for name, _ in tensors_of(SMALL)}
    assert read["blk.1.ffn_down_exps.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert [int(n) for n in read["blk.0.ffn_gate_exps.weight"].shape] == [64, 64, 4]


def measured() -> moe.Mixtures:
    made = moe.Mixtures(peak={"32x768-top4": SHAPES["32x768-top4"].float_bytes * 3 // 10})
    outcomes = made.outcomes["32x768-top4"] = {}
    for label, us, peak in ((moe.OURS, 10_000.0, 300), (moe.FLOAT, 40_000.0, 1100), (moe.LLAMA, 9_000.0, 500)):
        timing = Timing(median_us=us, low_us=us, high_us=us, calls=3)
        outcomes[label] = Outcome(label, timings={"decode, batch 1": timing}, tokens={"decode, batch 1": 1}, peak=peak)
    return made


def test_goals_of_mixtures() -> None:
    found = {(goal.text, goal.beside): goal for goal in moe.goals(measured())}
    assert found["decode, batch 1", moe.FLOAT].value == 4.0 and found["decode, batch 1", moe.FLOAT].reached
    assert found["decode, batch 1", moe.LLAMA].value == 0.9 and not found["decode, batch 1", moe.LLAMA].reached
    assert found["prefill 512", moe.LLAMA].reached is None
    assert found["peak memory added", "bf16 weights"].value == pytest.approx(0.3)


def test_tables_of_mixtures(tmp_path: Path) -> None:
    made = measured()
    assert "0.90x" in moe.text(made) and "not reached" in moe.text(made)
    data = {"machine": "one", "date": "today", **moe.as_data(made)}
    (tmp_path / "avx2").mkdir()
    (tmp_path / "avx2" / "moe-one.json").write_text(json.dumps(data))
    told = section(tmp_path)
    assert "| 32x768-top4 | llama.cpp Q4_0 | 111.1 |" in told and "2 of the 3 goals" in told


@pytest.mark.slow
def test_the_workers_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_torch

    monkeypatch.setitem(SHAPES, "small", SMALL)
    model = float_model(SMALL)
    qpass.quantize(model, "w4a8_channel", progress=False)
    qpass.save(model, tmp_path / "m")
    for dtype, folder in (("bfloat16", None), ("float32", str(tmp_path / "m"))):
        worker = moe_torch.Moe("small", dtype, folder)
        assert worker.answer({"do": "load"})["weights"] > 0
        for request in moe.METRICS.values():
            answer = worker.answer({**request, "tokens": 4})
            assert answer["us"] and all(us > 0 for us in answer["us"])
