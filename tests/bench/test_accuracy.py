"""The accuracy benchmark's goals: each names a row, is compared with that row's record, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import torch
from accuracy import chosen
from accuracy_peers import PEERS
from accuracy_rows import GOALS, ROWS, Row, goal_lines


def test_every_goal_is_of_a_row_and_rows_have_names_of_their_own() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and {goal.row for goal in GOALS} <= set(names)


def test_goals_show_what_was_measured_and_what_was_not() -> None:
    facts = {"row": "w8a8, smoothquant", "seconds": 9.0, "cpu_seconds": 12.0, "samples": 8, "windows": 4}
    lines = goal_lines([{**facts, "text": "austen", "kl": 0.0094}, {**facts, "text": "union", "kl": 0.0097}])
    line, = [line for line in lines if line.startswith("w8a8")]
    assert "0.0094" in line and "0.0097" in line and "missed" not in line
    assert sum("not measured" in line for line in lines) == len(GOALS) - 1
    worse = goal_lines([{**facts, "text": "austen", "kl": 0.0194}])
    assert sum("missed" in line for line in worse) == 1


def test_a_peer_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    for peer in PEERS:
        assert "pip install" in (peer.missing(None) or "") and "not installed" in (peer.missing(tmp_path) or "")
        python = tmp_path / peer.folder / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
        assert peer.missing(tmp_path) is None


def test_a_row_takes_samples_spread_over_all_of_them() -> None:
    row = Row("few", "w4a16", 64, ("gptq",), samples=4)
    assert row.picked(torch.arange(10)[:, None]).flatten().tolist() == [0, 2, 5, 7]
    assert len(row.picked(torch.arange(3)[:, None])) == 3 and len(ROWS[0].picked(torch.arange(10)[:, None])) == 10


def test_rows_are_asked_for_by_whole_name_or_by_part() -> None:
    assert chosen("w8a8, smoothquant", ["w8a8, smoothquant"])
    assert not chosen("w8a8, smoothquant, gptq", ["w8a8, smoothquant"])
    assert chosen("w8a8, smoothquant, gptq", ["smooth"]) and chosen("w8a8, smoothquant", [""])
