"""The accuracy benchmark: rows, peers and goals are printed, each goal beside its row's record, and what is missing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy
import pytest
import torch
from accuracy import CALIBRATE_ON, EVALUATE_ON, chosen, main
from accuracy_peers import PEERS, AccuracyPeer
from accuracy_records import Records, Size
from accuracy_rows import GOALS, ROWS, Goal, Row, goal_lines, picked, verdict


def test_every_goal_is_of_a_row_and_rows_have_names_of_their_own() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and {goal.row for goal in GOALS} <= set(names)


def test_goals_show_what_was_measured_and_what_was_not() -> None:
    facts = {"row": "w8a8, smoothquant", "seconds": 9.0, "cpu_seconds": 12.0, "samples": 8, "windows": 4, "threads": 2}
    lines = goal_lines([{**facts, "text": "austen", "kl": 0.0094}, {**facts, "text": "union", "kl": 0.0097}])
    line, = [line for line in lines if line.startswith("w8a8, smoothquant")]
    assert "0.0094" in line and "0.0097" in line and "missed" not in line
    assert sum("not measured" in line for line in lines) == len(GOALS) - 1
    worse = goal_lines([{**facts, "text": "austen", "kl": 0.0194}])
    assert sum("KL missed" in line for line in worse) == 1


@pytest.mark.parametrize(("seconds", "threads", "said"), [(4.0, 1, ""), (6.0, 2, "  seconds missed"),
                                                          (6.0, 1, "  seconds not judged: too few threads")])
def test_seconds_are_judged_where_the_run_had_enough_threads(seconds: float, threads: int, said: str) -> None:
    goal = Goal(row="any", kl=0.3, seconds=5)
    assert verdict(goal, {"kl": 0.2, "seconds": seconds, "threads": threads}) == said
    assert verdict(goal, {"kl": 0.4, "seconds": seconds, "threads": threads}) == f"  KL missed{said}"


def test_kept_records_are_found_at_their_size_and_replaced_by_the_same_measurement_only(tmp_path: Path) -> None:
    size = Size(model="small", length=512, windows=16)
    records = Records(tmp_path / "found.json")
    records.add("a row", size, {"text": "austen", "samples": 4, "kl": 0.5})
    records.add("a row", replace(size, windows=2), {"text": "austen", "samples": 4, "kl": 0.6})
    records.add("no data", size, {"text": "austen", "samples": 0, "kl": 0.7})
    records.add("a row", size, {"text": "austen", "samples": 4, "kl": 0.4})
    again = Records(tmp_path / "found.json")
    assert [record["kl"] for record in again.records] == [0.6, 0.7, 0.4]
    assert {text: record["kl"] for text, record in again.found("a row", size, 4).items()} == {"austen": 0.4}
    assert again.found("no data", size, 128) and not again.found("a row", size, 8)
    assert not again.found("a row", replace(size, model="large"), 4)


def test_a_peer_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    for peer in PEERS:
        assert peer.how in (peer.missing(None) or "")
        program = tmp_path / peer.folder / peer.program
        if not program.exists():
            assert "not installed" in (peer.missing(tmp_path) or "")
            program.parent.mkdir(parents=True)
            program.touch()
        assert peer.missing(tmp_path) is None


def test_rows_of_one_run_of_a_tool_differ_in_how_it_is_loaded() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    samples = torch.zeros(128, 8)
    runs = {(peer.run_name(Path("a"), picked(samples, peer.samples)), peer.recipe) for peer in PEERS}
    assert len(runs) == len(PEERS) and len({run for run, _ in runs}) < len(PEERS)


def test_what_a_tool_wrote_is_not_taken_for_another_model_or_other_samples() -> None:
    peer, samples = PEERS[0], torch.zeros(128, 8)
    names = [peer.run_name(Path(model), given) for model, given in (
        ("a", samples), ("b", samples), ("a", samples[1:]), ("a", samples[:, 1:]))]
    assert len(set(names)) == len(names)


def test_a_row_takes_samples_spread_over_all_of_them() -> None:
    row = Row("few", "w4a16", 64, ("gptq",), samples=4)
    assert picked(torch.arange(10)[:, None], row.samples).flatten().tolist() == [0, 2, 5, 7]
    assert len(picked(torch.arange(3)[:, None], row.samples)) == 3
    assert len(picked(torch.arange(10)[:, None], None)) == 10


def test_rows_are_asked_for_by_whole_name_or_by_part() -> None:
    assert chosen("w8a8, smoothquant", ["w8a8, smoothquant"])
    assert not chosen("w8a8, smoothquant, gptq", ["w8a8, smoothquant"])
    assert chosen("w8a8, smoothquant, gptq", ["smooth"]) and chosen("w8a8, smoothquant", [""])


SIZES = {"vocab_size": 128, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2,
         "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 2048, "bos_token_id": 1,
         "eos_token_id": 2}


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Arguments for a tiny model, texts of letters, and the smallest settings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, texts = tmp_path / "model", tmp_path / "texts"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM._from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16).save_pretrained(folder)
        letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
        letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(folder)
        texts.mkdir()
        for name in (*CALIBRATE_ON, *(part for parts in EVALUATE_ON.values() for part in parts)):
            (texts / f"{name}.txt").write_text("".join(map(chr, torch.randint(97, 123, (2100,)).tolist())))
    return ["accuracy.py", "--model", str(folder), "--texts", str(texts), "--samples", "4", "--length", "256",
            "--windows", "1", "--text", "union", "--cache", str(tmp_path / "cache"), "--json",
            str(tmp_path / "found.json")]


def test_prints_rows_peers_that_are_missing_and_goals(given: list[str], monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    peers = [peer.name for peer in PEERS]
    rows = ["w8a8, round to nearest", "w4a16 g64, gptq on 32 samples"]
    monkeypatch.setattr("sys.argv", [*given, "--only", *rows, *peers])
    main()
    records = json.loads(Path(given[-1]).read_text())
    assert [record["row"] for record in records] == rows[::-1]  # in the table's order
    assert all(0 < record["kl"] < 1 and record["bits"] > 4 and record["windows"] == 1 for record in records)
    printed = capsys.readouterr().out.splitlines()
    for peer in peers:
        line, = [line for line in printed if line.startswith(f"{peer:<50} ")]
        assert "not installed: " in line
    assert len(printed) == 1 + len(rows) + len(peers) + 3 + len(GOALS)
    assert sum(goal.row in line for goal in GOALS for line in printed[-len(GOALS):]) >= len(GOALS)

    def never(*_: Any) -> None:
        raise AssertionError("a row that has been measured is not run again")

    monkeypatch.setattr(accuracy, "load", never)
    main()
    again = capsys.readouterr().out.splitlines()
    assert [line + "*" for line in printed[1:3]] == again[1:3] and again[3:] == printed[3:]
    monkeypatch.setattr("sys.argv", [*given, "--only", rows[0], "--again"])
    with pytest.raises(AssertionError, match="not run again"):
        main()


def test_a_peer_that_fails_costs_its_row_only(given: list[str], monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fails(peer: AccuracyPeer, *_: Any) -> None:
        raise RuntimeError(f"{peer.name} ended with 1:\nno such device")

    monkeypatch.setattr(AccuracyPeer, "missing", lambda *_: None)
    monkeypatch.setattr(AccuracyPeer, "run", fails)
    monkeypatch.setattr("sys.argv", [*given, "--peers", str(tmp_path), "--only", *(peer.name for peer in PEERS)])
    main()
    said = capsys.readouterr()
    assert said.err.count("no such device") == len(PEERS) and all(peer.name in said.err for peer in PEERS)
    assert len(said.out.splitlines()) == 1 + 3 + len(GOALS)


TOOL = """
import json, shutil, sys
from safetensors.torch import load_file, save_file
model, ids, out, said = sys.argv[1:5]
shutil.copytree(model, out)
weights = load_file(f"{out}/model.safetensors")
save_file({name: weight.float().mul(16).round().div(16).to(weight.dtype) for name, weight in weights.items()},
          f"{out}/model.safetensors", {"format": "pt"})
print("progress")
print(json.dumps({"float": True, "bits": 4.5, "seconds": 1.5, "cpu_seconds": 3.0}))
"""


def test_a_tool_runs_once_for_all_its_rows(given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, program = tmp_path / "tool.py", tmp_path / "peers" / "tool" / "venv" / "bin" / "python"
    script.write_text(TOOL)
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    first = AccuracyPeer(name="rounded", folder="tool", script=str(script), how="", settings=("a",), samples=2)
    second = replace(first, name="rounded again")
    monkeypatch.setattr(accuracy, "PEERS", (first, second))
    monkeypatch.setattr("sys.argv", [*given, "--peers", str(tmp_path / "peers"), "--work", str(tmp_path / "work"),
                                     "--only", "rounded", "rounded again"])
    main()
    one, other = json.loads(Path(given[-1]).read_text())
    assert {**one, "row": ""} == {**other, "row": ""} and one["row"] != other["row"]
    assert (one["bits"], one["seconds"], one["samples"]) == (4.5, 1.5, 2) and 0 < one["kl"] == one["float_kl"] < 1
    folder, = (tmp_path / "work").iterdir()
    assert len(torch.load(folder / "ids.pt")) == 2


@pytest.mark.slow
def test_every_row_runs(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", given)
    main()
    records = json.loads(Path(given[-1]).read_text())
    assert [record["row"] for record in records] == [row.name for row in ROWS]
    assert all(0 < record["kl"] < 10 for record in records)
