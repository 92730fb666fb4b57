"""Whole models: the worker of PyTorch's models at a small size, llama.cpp's programs by their output, goals, tables."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model
import pytest
import torch
import turns
from llama_bench import LlamaBench
from model import METRICS, Models, Outcome
from model_tables import as_data, outcomes, text
from readme import section
from turns import Timing, Worker

import qpass

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "w4a8"])
def test_the_worker_answers_every_request(tmp_path: Path, tiny_llama: Any, recipe: str | None) -> None:
    model = tiny_llama(dtype=torch.bfloat16, hidden_size=128, intermediate_size=256, max_position_embeddings=1024)
    if recipe is None:
        model.save_pretrained(tmp_path / "m")
    else:
        qpass.save(qpass.quantize(model, qpass.Recipe(recipe), progress=False), tmp_path / "m")
    worker = Worker([sys.executable, str(HERE / "model_torch.py"), str(tmp_path / "m")], os.environ)
    try:
        assert "PyTorch" in worker.ask(do="hello")["versions"]
        loaded = worker.ask(do="load")
        assert loaded["seconds"] > 0 and loaded["weights"] > 0, loaded
        for metric, request in METRICS.items():
            small = {**request, "tokens": 20 if request["do"] == "prefill" else 3}
            told = worker.ask(**small)
            assert told.get("us") and all(us > 0 for us in told["us"]), (metric, told)
            assert len(told["us"]) == (3 if request["do"] == "decode" else 1)
        assert worker.ask(do="compile")["us"][0] > 0
    finally:
        worker.close()


def test_llama_bench_reads_what_the_programs_print(tmp_path: Path) -> None:
    programs = {"llama-bench": '{"avg_ts": 50.0}', "llama-batched-bench": '{"speed_tg": 64.0}', "llama-quantize": ""}
    for name, line in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho chatter\necho '{line}'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    bench = LlamaBench(tmp_path, tmp_path / "m-bf16.gguf", "Q4_0", 2)
    assert bench.file.name == "m-Q4_0.gguf"
    assert bench.ask(do="load")["peak"] > 0
    assert bench.ask(do="prefill", tokens=512)["us"] == [512 / 50.0 * 1e6]
    assert bench.ask(do="decode", batch=1, tokens=4)["us"] == [1e6 / 50.0]
    assert bench.ask(do="decode", batch=16, tokens=4)["us"] == [16 / 64.0 * 1e6]
    (tmp_path / "llama-bench").write_text("#!/bin/sh\nexit 3\n")
    assert bench.ask(do="prefill", tokens=512) == bench.ask(do="load") == {
        "failed": "llama-bench ended with exit code 3"}


def measured() -> Models:
    made = Models(quantize_s={"qpass w4a8": 2.0, "LLM Compressor w4a8": "not installed"},
                  compile_s={"qpass w4a8, cold": 30.0, "torch bf16, cold": 20.0})
    for label, us, peak in (("qpass w4a8", 40_000.0, 950_000_000), ("llama.cpp Q4_0", 50_000.0, 900_000_000)):
        made.outcomes[label] = Outcome(label, timings={"decode, batch 1": Timing(
            median_us=us, low_us=us * 0.99, high_us=us * 1.01, calls=9)}, tokens={"decode, batch 1": 1}, peak=peak)
    made.outcomes["OpenVINO int4"] = Outcome("OpenVINO int4", why_not="it does not start")
    return made


def test_a_peer_that_takes_minutes_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "METRICS", {"decode, batch 1": {"do": "decode", "batch": 1, "tokens": 2}})
    monkeypatch.setattr(turns, "BUSY_LIMIT", float("inf"))
    labels = ("qpass w4a8", "vLLM w8a8")
    made, calls = Models(outcomes={label: Outcome(label) for label in labels}), dict.fromkeys(labels, 0)

    def asker(label: str) -> Callable[..., dict[str, Any]]:
        def ask(**request: Any) -> dict[str, Any]:
            calls[label] += 1
            return {"us": [1000.0 * calls[label]]}
        return ask

    askers = {label: asker(label) for label in labels}
    kept: list[set[str]] = []
    for slow, wanted in ((1e9, 4), (-1.0, 1)):  # 3 turns after the first call
        calls.update(dict.fromkeys(labels, 0))
        monkeypatch.setattr(model, "SLOW_S", slow)
        model._measure(made, {}, askers, lambda made: kept.append(set(made.outcomes["qpass w4a8"].timings)))
        assert calls == {"qpass w4a8": 4, "vLLM w8a8": wanted}  # ours compiles at its first call
    assert made.outcomes["vLLM w8a8"].timings["decode, batch 1"].median_us == 1000
    assert kept == [{"decode, batch 1"}] * 2

    def silent(**request: Any) -> dict[str, Any]:
        raise turns.WorkerDied("no answer within 60 s")

    model._measure(made, {}, {**askers, "vLLM w8a8": silent}, lambda made: None)
    assert made.outcomes["vLLM w8a8"].why_not == "decode, batch 1: no answer within 60 s"


def test_what_a_stopped_run_leaves_can_be_kept() -> None:
    assert not any(goal["reached"] for goal in as_data(Models())["goals"])
    assert as_data(Models(quantize_s={"qpass w4a8": 3.0}))["quantize_s"] == {"qpass w4a8": 3.0}


def test_goals_of_whole_models() -> None:
    found = {outcome.text: outcome for outcome in outcomes(measured())}
    assert found["w4a8 decode, batch 1"].value == 1.25 and found["w4a8 decode, batch 1"].reached
    assert found["w4a8 peak memory after load"].reached and found["quantize to w4a8"].reached
    assert found["torch.compile, cold"].value == 1.5 and found["torch.compile, cold"].reached is False
    assert found["torch.compile, warm"].reached is None
    assert found["w4a8 decode, batch 16"].why_not == "it does not start"


def test_tables_of_whole_models(tmp_path: Path) -> None:
    said = text(measured())
    assert "25.0 ±1%" in said and "20.0 ±1%" in said and "not installed" in said and "it does not start" in said
    data = {"machine": "a machine", "date": "a date", **as_data(measured())}
    for kind in ("amx_int8", "avx2", "empty"):
        (tmp_path / kind).mkdir()
    (tmp_path / "avx2" / "model.json").write_text(json.dumps(data))
    shown = section(tmp_path)
    assert shown.startswith("### On a machine with avx2\n\n") and shown.count("###") == 1
    assert "a machine; a date UTC" in shown and "| qpass w4a8 | 25.0 |" in shown and "950 MB" in shown
    assert "3 of the 4 goals" in shown
