"""Accuracy rows: the ways to quantize that the accuracy table compares, and the goals that they are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import qpass

SEARCH_SAMPLES, SEARCH_LENGTH = 32, 128
SEARCH_SCHEMES = (("w3a16", (64,)), ("w4a16", (32, 64, 96, 192)), ("w4a16_asym", (64,)), ("w5a16", (64, 96)),
                  ("w6a16", (64,)), ("w8a16", (64,)))
GOALS_ON = "austen"  # the text that the goals are of; a gain must hold on the other one too
GOAL_THREADS = 2  # what the goals' seconds are of


def picked(samples: Tensor, wanted: int | None) -> Tensor:
    """So many of the samples [S, T], spread over all; None is all of them."""
    count = len(samples) if wanted is None else min(wanted, len(samples))
    return samples[[len(samples) * number // count for number in range(count)]]


@dataclass(frozen=True)
class Row:
    """One way to quantize: a preset, the group size of its weights (None keeps the preset's), and algorithms.

    With `budget` the schemes are searched for, among SEARCH_SCHEMES. `samples` says on how many of the calibration
    samples it runs, where time counts; None is all of them. `exact` emulates the rounding of activations that this
    machine cannot compute with.
    """

    name: str
    preset: str
    group_size: int | None
    algorithms: tuple[Any, ...] = ()
    budget: str | None = None
    samples: int | None = None
    exact: bool = False

    def recipe(self, model: Any, samples: Tensor) -> qpass.Recipe:
        """The recipe; a search looks at the model and at the samples."""
        if self.budget is not None:
            schemes = [qpass.PRESETS[name].with_group_size(size) for name, sizes in SEARCH_SCHEMES for size in sizes]
            every = [row[None] for sample in samples for row in sample.split(SEARCH_LENGTH)]
            data = every[::max(1, len(every) // SEARCH_SAMPLES)]
            return qpass.search(model, self.budget, data=data, schemes=schemes, num_samples=SEARCH_SAMPLES,
                                max_seq_length=SEARCH_LENGTH, algorithms=self.algorithms)
        scheme = qpass.PRESETS[self.preset]
        recipe = qpass.Recipe(scheme if self.group_size is None else scheme.with_group_size(self.group_size),
                              algorithms=self.algorithms)
        return recipe.exactly() if self.exact else recipe


ROWS = (
    Row("w4a16 g64, round to nearest", "w4a16", 64),
    Row("w4a16 g64, scales", "w4a16", 64, ("scales",)),
    Row("w4a16 g64, scales of the weights alone", "w4a16", 64, ({"scales": {"probe": 0}},)),
    Row("w4a16 g64, positive scales", "w4a16", 64, ({"scales": {"method": "search"}},)),
    Row("w4a16 g64, hqq", "w4a16", 64, ({"scales": {"method": "hqq"}},)),
    Row("w4a16_asym g64, round to nearest", "w4a16_asym", 64),
    Row("w4a16_asym g64, scales", "w4a16_asym", 64, ("scales",)),
    Row("w4a16_asym g64, scales of the weights alone", "w4a16_asym", 64, ({"scales": {"probe": 0}},)),
    Row("w4a16_asym g64, hqq", "w4a16_asym", 64, ({"scales": {"method": "hqq"}},)),
    Row("w4a16 g64, awq", "w4a16", 64, ({"awq": {"clip": True}},)),
    Row("w4a16 g64, gptq as published", "w4a16", 64, ({"gptq": {"match_float": False, "refit": False, "sweeps": 0}},)),
    Row("w4a16 g64, gptq", "w4a16", 64, ("gptq",)),
    Row("w4a16 g64, gptq on 32 samples", "w4a16", 64, ("gptq",), samples=32),
    Row("w4a16 g64, gptq on 12 samples, no match", "w4a16", 64, ({"gptq": {"match_float": False, "sweeps": 1}},),
        samples=12),
    Row("w4a16 g64, gptq, positive scales", "w4a16", 64, ({"gptq": {"scales": "absmax"}},)),
    Row("w4a16 g64, autoround", "w4a16", 64, ("autoround",)),
    Row("w4a16 g64, gptq, autoround", "w4a16", 64, ("gptq", {"autoround": {"iterations": 50}})),
    Row("w4a16_asym g64, gptq", "w4a16_asym", 64, ("gptq",)),
    Row("search at 4.5 bits, gptq", "search", None, ("gptq",), budget="4.5 bits", samples=64),
    Row("w4a8 g64, round to nearest", "w4a8", 64),
    Row("w4a8 g64, gptq", "w4a8", 64, ("gptq",)),
    Row("w4a8 g64, gptq, autoround", "w4a8", 64, ("gptq", {"autoround": {"iterations": 50}})),
    Row("w8a8, round to nearest", "w8a8", None),
    Row("w8a8, smoothquant", "w8a8", None, ("smoothquant",)),
    Row("w8a8, smoothquant at 0.5", "w8a8", None, ({"smoothquant": {"alpha": 0.5}},)),
    Row("w8a8, smoothquant, gptq", "w8a8", None, ("smoothquant", "gptq")),
    Row("w8a8, rotation", "w8a8", None, ({"rotation": {"rotations": ["R1", "R2", "R4"]}},)),
    Row("w8a16 g32, round to nearest", "w8a16", 32),
    Row("fp8, its activations too", "fp8_dynamic", None, exact=True),
)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The largest KL, in nats a token, that a row may have on GOALS_ON; and seconds on two cores with AMX."""

    row: str
    kl: float
    seconds: float | None = None


GOALS = (
    Goal(row="w4a16 g64, scales", kl=0.30, seconds=5),
    Goal(row="w4a16_asym g64, scales", kl=0.24, seconds=20),
    Goal(row="w4a16 g64, gptq on 12 samples, no match", kl=0.13, seconds=75),
    Goal(row="w4a16 g64, gptq on 32 samples", kl=0.055, seconds=320),
    Goal(row="w4a16 g64, gptq", kl=0.042, seconds=1200),
    Goal(row="w4a8 g64, gptq", kl=0.065),
    Goal(row="w8a8, smoothquant", kl=0.012),
    Goal(row="w8a8, rotation", kl=0.012),
    Goal(row="search at 4.5 bits, gptq", kl=0.035),
)


def goal_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of goals: what each row was measured at, on the goal's text and beside it on the others.

    Seconds are judged where the run had the two threads that they are of, or kept them with fewer.
    """
    lines = [f"{'goal':<40} {'KL <=':>6} {'KL':>7} {'other text':>10} {'s <=':>6} {'s':>7} {'cpu s':>7} {'threads':>7} "
             f"{'samples':>7} {'windows':>7}"]
    for goal in GOALS:
        found = {record["text"]: record for record in records if record["row"] == goal.row}
        seconds = "" if goal.seconds is None else f"{goal.seconds:g}"
        start = f"{goal.row:<40} {goal.kl:>6}"
        if GOALS_ON not in found:
            lines.append(f"{start} {'not measured':>18} {seconds:>6}")
            continue
        own = found[GOALS_ON]
        others = ", ".join(f"{record['kl']:.4f}" for text, record in found.items() if text != GOALS_ON)
        lines.append(f"{start} {own['kl']:>7.4f} {others:>10} {seconds:>6} {own['seconds']:>7.1f} "
                     f"{own['cpu_seconds']:>7.1f} {own['threads']:>7} {own['samples']:>7} {own['windows']:>7}"
                     f"{verdict(goal, own)}")
    return lines


def verdict(goal: Goal, found: Mapping[str, Any]) -> str:
    """What of a goal a record misses, or leaves open; nothing if it is reached."""
    said = [] if found["kl"] <= goal.kl else ["KL missed"]
    if goal.seconds is not None and found["seconds"] > goal.seconds:
        said.append("seconds missed" if found["threads"] >= GOAL_THREADS else "seconds not judged: too few threads")
    return "".join(f"  {part}" for part in said)
