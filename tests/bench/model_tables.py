"""Model tables: measured whole models in, their tables and goals as text and as numbers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from model import FLOAT_PREFILL, METRICS, Models
from tables import aligned
from turns import BUSY_LIMIT


@dataclass(frozen=True, kw_only=True)
class ModelGoal:
    """`value(models)` is to be at least `goal`, or at most where `at_most`; None where a side was not measured."""

    text: str
    beside: str
    goal: float
    value: Callable[[Models], float | None]
    unit: str = "x"
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelOutcome:
    """A goal with what was measured."""

    text: str
    beside: str
    goal: float
    unit: str
    at_most: bool
    value: float | None
    why_not: str | None

    @property
    def reached(self) -> bool | None:
        """None if it was not measured."""
        if self.value is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def _faster(ours: str, peer: str, metric: str) -> Callable[[Models], float | None]:
    def value(made: Models) -> float | None:
        rates = [made.outcomes[label].rate(metric) if label in made.outcomes else None for label in (ours, peer)]
        return rates[0] / rates[1] if rates[0] and rates[1] else None

    return value


def _memory(made: Models) -> float | None:
    ours, theirs = (made.outcomes[label].peak if label in made.outcomes else None
                    for label in ("qpass w4a8", "llama.cpp Q4_0"))
    return ours / theirs if ours and theirs else None


def _compiling(state: str) -> Callable[[Models], float | None]:
    def value(made: Models) -> float | None:
        ours, theirs = (made.compile_s.get(f"{label}, {state}") for label in ("qpass w4a8", "torch bf16"))
        return ours / theirs if isinstance(ours, float) and isinstance(theirs, float) else None

    return value


def _quantizing(made: Models) -> float | None:
    seconds = made.quantize_s.get("qpass w4a8")
    return seconds if isinstance(seconds, float) else None


GOALS = (
    ModelGoal(text="w4a8 decode, batch 1", beside="llama.cpp Q4_0", goal=1.15,
              value=_faster("qpass w4a8", "llama.cpp Q4_0", "decode, batch 1")),
    ModelGoal(text="w4a8 decode, batch 16", beside="OpenVINO int4", goal=1.4,
              value=_faster("qpass w4a8", "OpenVINO int4", "decode, batch 16")),
    ModelGoal(text="w4a8 prefill 512", beside="vLLM w4a8", goal=2.5,
              value=_faster("qpass w4a8", "vLLM w4a8", "prefill")),
    ModelGoal(text="w8a8 prefill 512", beside="vLLM w8a8", goal=1.5,
              value=_faster("qpass w8a8", "vLLM w8a8", "prefill")),
    ModelGoal(text="w4a8 peak memory after load", beside="llama.cpp Q4_0", goal=1.15, value=_memory, at_most=True),
    ModelGoal(text="quantize to w4a8", beside="2.5 s", goal=2.5, value=_quantizing, unit=" s", at_most=True),
    ModelGoal(text="torch.compile, cold", beside="the float model", goal=1.2, value=_compiling("cold"), at_most=True),
    ModelGoal(text="torch.compile, warm", beside="the float model", goal=1.2, value=_compiling("warm"), at_most=True))


def outcomes(made: Models) -> list[ModelOutcome]:
    """Each goal with its value."""
    return [ModelOutcome(text=goal.text, beside=goal.beside, goal=goal.goal, unit=goal.unit, at_most=goal.at_most,
                         value=goal.value(made), why_not=None if goal.value(made) is not None else _why(goal, made))
            for goal in GOALS]


def _why(goal: ModelGoal, made: Models) -> str:
    outcome = made.outcomes.get(goal.beside)
    if goal.beside == "vLLM w4a8":
        return "vLLM builds this kernel for AVX512 only"
    return (outcome.why_not if outcome is not None else None) or f"{goal.beside} was not timed"


def text(made: Models) -> str:
    """The speeds with their spread, what loading took, the seconds of quantization and compilation, and the goals."""
    metrics = (f"{metric}{' 512' * (metric == 'prefill')}" for metric in METRICS)
    rows = [["tokens a second", *metrics, "peak MB", "load s"]]
    notes = []
    for label, outcome in made.outcomes.items():
        cells = [label]
        for metric in METRICS:
            rate, timing = outcome.rate(metric), outcome.timings.get(metric)
            cells.append(f"{rate:.1f} ±{timing.spread:.0f}%" if rate and timing else "-")
            if timing is not None and timing.why_not:
                notes.append(f"  {label}, {metric}: {timing.why_not}")
        rows.append([*cells, f"{outcome.peak / 1e6:.0f}" if outcome.peak else "-",
                     f"{outcome.load_s:.1f}" if outcome.load_s else "-"])
        notes += [f"  {label}: {outcome.why_not}"] if outcome.why_not else []
    notes += [f"  {metric}: other processes used {cores:.1f} cores" for metric, cores in made.others.items()
              if cores > BUSY_LIMIT]
    known = {**{f"quantize, {label}": value for label, value in made.quantize_s.items()},
             **{f"torch.compile, {label}": value for label, value in made.compile_s.items()}}
    seconds = [["seconds", ""], *([label, f"{value:.1f}" if isinstance(value, float) else value]
                                  for label, value in known.items())]
    return "\n".join([aligned(rows), *notes, f"  torch bf16: prompt of {FLOAT_PREFILL} tokens, not compiled", "",
                      aligned(seconds), "", aligned([["goal", "beside", "to reach", "measured", "result"],
                                                     *map(goal_row, outcomes(made))], left=2)])


def goal_row(outcome: ModelOutcome) -> list[str]:
    """A goal as cells of a table."""
    sign = "<=" if outcome.at_most else ">="
    value = "" if outcome.value is None else f"{outcome.value:.2f}{outcome.unit}"
    result = f"not measured: {outcome.why_not}" if outcome.reached is None else (
        "reached" if outcome.reached else "not reached")
    return [outcome.text, outcome.beside, f"{sign} {outcome.goal:g}{outcome.unit}", value, result]


def as_data(made: Models) -> dict[str, Any]:
    """The numbers for JSON; goals as they came out."""
    return {**asdict(made), "goals": [{**asdict(outcome), "reached": outcome.reached} for outcome in outcomes(made)]}
