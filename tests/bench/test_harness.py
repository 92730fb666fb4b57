"""The harness: every timed output is checked, peers take turns, and what cannot be measured is said with its reason."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import run
from cells import TABLES, W4A8, Column, Goal, Table
from goals import outcomes
from lane import copies_for, draw_weight, multiplied_out, round_to_nearest, rows_checked
from peers import PEERS, Found, Peer, find_peers
from products import Bench, Cell, Options
from tables import goals_text, table_text
from turns import Timing, Worker, WorkerDied, others_busy, take_turns, take_turns_quietly
from worker import relative_error

HERE = Path(__file__).parent
VARIANTS = ("right", "wrong", "refuses", "raises", "dies", "never")
TABLE = Table(name="echo", shapes=(((32,), 48),), tokens=(1, 64),
              columns=tuple(Column(label=f"echo {name}", peer="echo", variant=name) for name in VARIANTS),
              goals=(Goal(subject="echo right", peer="echo wrong", tokens=(1,), ratio=1.0),))


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker([sys.executable, str(HERE / "echo_lanes.py")], os.environ)
    yield started
    started.close()


def test_a_worker_times_checks_and_frees(worker: Worker) -> None:
    assert worker.ask(do="hello") == {"versions": {"echo": "1"}, "refuses": {"never": "it needs a moon"}}
    assert worker.ask(do="prepare", lane="a", variant="right", n=[8, 24], k=48, ms=[1], rotate=1 << 16) == {
        "bytes": 32 * 48 * 4}
    told = worker.ask(do="time", lane="a", m=1, k=48, seconds=0.005)
    assert len(told["us"]) > 1 and all(us > 0 for us in told["us"]) and told["error"] < 1e-5
    assert worker.ask(do="drop") == {}
    assert "failed" in worker.ask(do="time", lane="a", m=1, k=48, seconds=0.005)


def test_one_wrong_output_among_many_is_found(worker: Worker) -> None:
    worker.ask(do="prepare", lane="a", variant="wrong", n=[32], k=48, ms=[1], rotate=1)
    assert "off by 1" in worker.ask(do="time", lane="a", m=1, k=48, seconds=0.01)["wrong"]


def test_a_worker_that_dies_says_so(worker: Worker) -> None:
    with pytest.raises(WorkerDied, match="exit code 3"):
        worker.ask(do="prepare", lane="a", variant="dies", n=[32], k=48, ms=[1], rotate=1)


def test_a_worker_without_an_answer_is_ended() -> None:
    silent = Worker([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
    try:
        with pytest.raises(WorkerDied, match="no answer within"):
            silent.ask(limit_s=0.1, do="hello")
        assert silent.process.wait(10) < 0
    finally:
        silent.close()


def test_a_table_is_measured_whatever_its_peers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "echo", Peer(name="echo", script="echo_lanes.py"))
    found = Found(None, commands={"echo": [sys.executable, str(HERE / "echo_lanes.py")]})
    alive = replace(TABLE, columns=tuple(c for c in TABLE.columns if c.variant != "dies"))
    with Bench(found, 1, Options(seconds=0.005, rotate=1), [TABLE]) as bench:
        cells = list(bench.table(alive))
        assert [cell.m for cell in cells] == [1, 64] and bench.versions == {"echo": {"echo": "1"}}
        first = cells[0].timings
        assert first["echo right"].median_us and first["echo right"].nbytes == 32 * 48 * 4
        assert (first["echo wrong"].why_not or "").startswith("wrong: ")
        assert first["echo refuses"].why_not == "it is made of paper"
        assert "ValueError: no" in (first["echo raises"].why_not or "")
        assert first["echo never"].why_not == "it needs a moon"
        text = table_text(alive, cells)
        assert "echo refuses (everywhere): it is made of paper" in text and "GB/s" in text and "TOPS" in text
        assert "not measured: wrong" in goals_text([alive], cells)
        # A peer that dies costs its own columns, not the run.
        dead = replace(TABLE, columns=(TABLE.columns[4], TABLE.columns[0]))
        assert "the process ended: exit code 3" in (next(bench.table(dead)).timings["echo dies"].why_not or "")
        assert next(bench.table(alive)).timings["echo right"].median_us


def test_a_run_that_is_stopped_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cells(bench: object, table: Table) -> Iterator[Cell]:
        yield cell(1, 2048)
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "__init__", lambda bench, *_: setattr(bench, "workers", {}))
    monkeypatch.setattr(Bench, "versions", {}, raising=False)
    monkeypatch.setattr(Bench, "table", cells)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--only", "kernels", "--tables", "W4A8", "--json", str(tmp_path)])
    (kept,) = json.loads((tmp_path / "kernels.json").read_text())["cells"]
    assert (kept["table"], kept["m"], kept["n"], kept["k"]) == ("W4A8", 1, [2048], 2048)
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


def test_turns_alternate_and_busy_stretches_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def taker(name: str, us: float) -> object:
        def take(seconds: float) -> dict[str, list[float]]:
            order.append(name)
            return {"us": [us]}

        return take

    timings = take_turns({"a": taker("a", 1.0), "b": taker("b", 2.0)}, rounds=3, seconds=0.0)  # type: ignore[dict-item]
    assert order == list("ababab") and timings["b"].median_us == 2.0 and timings["a"].calls == 3
    busy = iter([1.0, 0.5, 0.05])
    monkeypatch.setattr("turns.others_busy", lambda workers, run: (next(busy), run()))
    order.clear()
    _, others = take_turns_quietly([], {"a": taker("a", 1.0)}, rounds=1, seconds=0.0)  # type: ignore[dict-item]
    assert others == 0.05 and len(order) == 3


def test_a_turn_ends_when_the_library_has_stopped_looking_for_work() -> None:
    spins = ("import sys, time\n"
             "for line in sys.stdin:\n"
             "    print('{}', flush=True)\n"
             "    end = time.process_time() + 0.1\n"
             "    while time.process_time() < end: pass\n")
    worker = Worker([sys.executable, "-c", spins], dict(os.environ))
    try:
        assert worker.ask() == {}
        assert worker.cpu_seconds() >= 0.1
    finally:
        worker.close()


def test_own_time_is_not_that_of_others() -> None:
    others, result = others_busy([], lambda: sum(range(10)))
    assert result == 45 and others >= 0.0


def cell(m: int, k: int, **us: float) -> Cell:
    timings = {column.label: Timing(why_not="not installed") for column in W4A8.columns}
    timings |= {label.replace("_", " "): Timing(median_us=value, low_us=value, high_us=value, calls=9, nbytes=1e6)
                for label, value in us.items()}
    return Cell(table="W4A8", m=m, n=(2048,), k=k, others=0.0, timings=timings)


def test_goals_count_where_they_are_reached() -> None:
    names = {"ours": "qpass w4a8 g128", "peer": "llama.cpp Q4_0"}
    made = []
    for k, ours, peer in ((2048, 100.0, 120.0), (4096, 100.0, 105.0)):
        one = cell(1, k)
        one.timings.update({names["ours"]: Timing(median_us=ours), names["peer"]: Timing(median_us=peer)})  # type: ignore[attr-defined]
        made.append(one)
    first = outcomes(W4A8, made)[0]
    assert (first.reached, first.reached_in, first.cells, first.lowest, first.highest) == (False, 1, 2, 1.05, 1.2)
    assert first.mark() == "reached in 1 of 2"
    assert outcomes(W4A8, made[:1])[0].mark() == "reached"
    made[0].timings[names["peer"]] = Timing(why_not="not installed")  # type: ignore[index]
    assert outcomes(W4A8, made[:1])[0].mark() == "not measured: not installed"
    assert outcomes(W4A8, made[:1])[0].reached is None


def test_tables_name_lanes_and_goals_that_exist() -> None:
    for table in TABLES:
        labels = [column.label for column in table.columns]
        assert len(set(labels)) == len(labels)
        assert all(column.peer in PEERS for column in table.columns)
        assert all({goal.subject, goal.peer} <= set(labels) for goal in table.goals)


def test_missing_peers_are_said_with_how_to_get_them(tmp_path: Path) -> None:
    found = find_peers(tmp_path)
    assert set(found.commands) == {"qpass", "torch"}
    assert "pip install openvino" in found.missing["OpenVINO"] and "llama-cpp-python" in found.missing["llama.cpp"]
    (tmp_path / "llamacpp" / "build" / "bin").mkdir(parents=True)
    (tmp_path / "llamacpp" / "build" / "bin" / "libggml-cpu.so").touch()
    assert "llama.cpp" in find_peers(tmp_path).commands
    with pytest.raises(SystemExit, match="no folder"):
        find_peers(tmp_path / "nowhere")


def test_weights_and_checks() -> None:
    weight = draw_weight(32, 64)
    assert (draw_weight(32, 64) == weight).all() and abs(float(weight.std()) * 8 - 1) < 0.1
    for bits, bound in ((4, 0.2), (8, 0.012)):
        codes, scale = round_to_nearest(weight, bits, 32)
        assert relative_error(multiplied_out(codes, scale), weight) < bound
        assert np.abs(codes).max() <= 2 ** (bits - 1)
        assert (scale.view(np.uint32) & 0xFFFF == 0).all()
    assert relative_error(weight[:1], weight) == relative_error(weight * np.nan, weight) == float("inf")
    assert rows_checked(1) == [0] and rows_checked(1024)[0] == 0 and rows_checked(1024)[-1] == 1023
    assert len(rows_checked(1024)) == 16 and rows_checked(4) == [0, 1, 2, 3]
    assert copies_for(1000, 10_000) == 10 and copies_for(10**9, 1) == 4


def test_lanes_of_qpass_and_torch_give_right_outputs() -> None:
    """The very workers, at a small size: each variant is prepared, timed once and checked."""
    wanted = {"lanes_qpass.py": ("w4a8_g32", "w4a8_g128_int", "w4a8_g128_static", "w4a8_channel_asym",
                                 "w8a8_channel", "w4a16_g128_asym"),
              "lanes_torch.py": ("bf16", "int4pack_w4a16", "int8pack_w8a16")}
    for script, variants in wanted.items():
        started = Worker([sys.executable, str(HERE / script)], os.environ)
        try:
            for variant in variants:
                made = started.ask(do="prepare", lane=variant, variant=variant, n=[256], k=256, ms=[1, 32], rotate=1)
                assert made.get("bytes", 0) > 0, (variant, made)
                for m in (1, 32):
                    told = started.ask(do="time", lane=variant, m=m, k=256, seconds=0.0)
                    assert told.get("us"), (variant, m, json.dumps(told))
        finally:
            started.close()
