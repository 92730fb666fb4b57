"""Online: the measurement of updates and caches, run in small, and what it says of goals."""

from __future__ import annotations

import online
import pytest

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "max_position_embeddings": 128}


@pytest.mark.slow
def test_runs_in_small() -> None:
    made = online.run(1, ("w4a8", "nvfp4"), ("bf16", "int8"), ((64, 128), (32, 64)), SMALL, batch=2, tokens=16, turns=2)
    assert all(ms > 0 for pair in made.updates.values() for ms in pair) and set(made.updates) == {"w4a8", "nvfp4"}
    assert set(made.steps) == {"bf16", "int8"} and all(ms > 0 for ms in made.steps.values()) and not made.why_not
    assert len(online.goals(made)) == 3 and "of 3 goals reached" in online.text(made)


def test_goals_and_text() -> None:
    made = online.Online(updates={"w4a8": (15.0, 10.0, 6.0), "nvfp4": (25.0, 20.0, 6.0)},
                         steps={"bf16": 13.0, "int8": 9.0, "fp8": 12.0, "int4": 11.0})
    assert [(goal["value"], goal["reached"]) for goal in online.goals(made)] == [
        (0.6, True), (0.3, False), (13 / 9, True), (13 / 12, False)]
    said = online.text(made)
    assert "2 of 4 goals reached" in said and "update nvfp4 0.30x of 0.5" in said and "1.44x" in said
    assert "0.40x" in said  # with the look
    assert online.as_data(made)["goals"][1]["reached"] is False
