"""MoE: whole mixtures of experts beside Transformers in bfloat16 and llama.cpp: speed, memory, and the goals.

usage: python tests/bench/run.py --only moe [--models 32x768-top4]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llama_bench import LlamaBench
from make_moe import SHAPES
from model import Outcome
from peers import HERE, PEERS, Found
from tables import aligned
from turns import BUSY_LIMIT, Take, Timing, Worker, WorkerDied, take_turns_quietly

METRICS: dict[str, dict[str, Any]] = {
    "decode, batch 1": {"do": "decode", "batch": 1, "tokens": 12},
    "decode, batch 16": {"do": "decode", "batch": 16, "tokens": 4},
    "prefill 512": {"do": "prefill", "tokens": 512}}
FLOAT, LLAMA, OURS = "torch bf16", "llama.cpp Q4_0", "qpass w4a8"
FLOAT_PREFILL = 32
"""Tokens of the float model's prompt: processors without bfloat16 instructions take seconds for them."""
SPEED_GOALS = {"decode, batch 1": (3.2, 1.1), "prefill 512": (2.5, 3.0), "decode, batch 16": (3.0, 1.5)}
"""How many times the speed of the float model and of llama.cpp."""
TIMED_LAYERS = 4
"""Of the 16, so that a run of all lasts minutes; memory is that of all 16."""
MEMORY_GOAL = 0.31
"""Of the bytes of the bfloat16 weights."""


@dataclass(frozen=True, kw_only=True)
class MoeGoal:
    """A goal with what was measured; `reached` is None if it was not."""

    shape: str
    text: str
    beside: str
    goal: float
    value: float | None
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass
class Mixtures:
    """All of one run: by shape, outcomes by label, and what a whole quantized model adds to a process; cores that
    others used."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    peak: dict[str, int | None] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


def run(found: Found, threads: int, cache: Path, shapes: Sequence[str] = tuple(SHAPES),
        keep: Callable[[Mixtures], None] = lambda made: None, memory: bool = True) -> Mixtures:
    """Make what is not made yet, then measure one shape after the other; `keep` is called after each metric."""
    cache.mkdir(parents=True, exist_ok=True)
    made = Mixtures()
    for name in shapes:
        gguf = cache / f"moe-{name}-{TIMED_LAYERS}-Q4_0.gguf"
        llama = "llama.cpp" in found.commands and found.root is not None
        for layers in (SHAPES[name].layers, TIMED_LAYERS):
            more = ["--gguf", gguf] if llama and layers == TIMED_LAYERS else []
            subprocess.run([sys.executable, HERE / "make_moe.py", f"{name}/{layers}",
                            cache / f"moe-{name}-{layers}-w4a8", *more], check=True, stdout=sys.stderr)
        made.outcomes[name] = {}
        if memory:
            made.peak[name] = _peak(name, found, threads, cache)
        workers, askers = _workers(made, name, found, threads, cache)
        if llama and found.root is not None:
            bench = LlamaBench(found.root / "llamacpp" / "build" / "bin",
                               gguf.with_name(f"moe-{name}-{TIMED_LAYERS}-bf16.gguf"), "Q4_0", threads)
            made.outcomes[name][LLAMA] = Outcome(LLAMA)
            _note(made.outcomes[name][LLAMA], bench.ask(do="load"))
            askers[LLAMA] = bench.ask
        try:
            _measure(made, name, workers, askers, keep)
        finally:
            for worker in workers:
                worker.close()
    return made


def _workers(made: Mixtures, name: str, found: Found, threads: int, cache: Path
             ) -> tuple[list[Worker], dict[str, Any]]:
    workers, askers = [], {}
    for label, dtype in ((OURS, our_dtype()), (FLOAT, "bfloat16")):
        outcome = made.outcomes[name][label] = Outcome(label)
        worker = Worker(
            [sys.executable, str(HERE / "moe_torch.py"), f"{name}/{TIMED_LAYERS}", dtype,
             *([] if label == FLOAT else [str(cache / f"moe-{name}-{TIMED_LAYERS}-w4a8")])],
            {**PEERS["qpass"].environment(found.root, threads), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")})
        workers.append(worker)
        try:
            made.versions[label] = worker.ask(do="hello")["versions"]
            answer = worker.ask(do="load")
        except (WorkerDied, KeyError) as why:
            outcome.why_not = str(why)
            print(f"  {name}: {label}: {why}", file=sys.stderr, flush=True)
            continue
        _note(outcome, answer)
        askers[label] = worker.ask
        print(f"  {name}: {label} loaded", file=sys.stderr, flush=True)
    return workers, askers


def _peak(name: str, found: Found, threads: int, cache: Path) -> int | None:
    """Bytes that loading the whole quantized model and making a token add to a process, in bfloat16."""
    shape = SHAPES[name]
    worker = Worker([sys.executable, str(HERE / "moe_torch.py"), f"{name}/{shape.layers}", "bfloat16",
                     str(cache / f"moe-{name}-{shape.layers}-w4a8")], PEERS["qpass"].environment(found.root, threads))
    try:
        peak = worker.ask(do="load").get("peak")
    except WorkerDied:
        return None
    finally:
        worker.close()
    print(f"  {name}: peak of {shape.layers} layers: {peak}", file=sys.stderr, flush=True)
    return None if peak is None else int(peak)


def our_dtype() -> str:
    """What our activations between products are: float32 where the processor has no instructions for bfloat16."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def _note(outcome: Outcome, answer: Mapping[str, Any]) -> None:
    outcome.load_s, outcome.peak = answer.get("seconds"), answer.get("peak")
    outcome.why_not = answer.get("failed") or answer.get("refused")


def _measure(made: Mixtures, name: str, workers: Sequence[Worker], askers: Mapping[str, Any],
             keep: Callable[[Mixtures], None]) -> None:
    outcomes = made.outcomes[name]
    for metric, request in METRICS.items():
        takers: dict[str, Take] = {}
        for label, ask in askers.items():
            if outcomes[label].why_not:
                continue
            mine = dict(request)
            if label == FLOAT:
                mine["tokens"] = FLOAT_PREFILL if request["do"] == "prefill" else 2
            try:
                answer = ask(**mine)  # compiles, and warms what it reads
            except WorkerDied as why:
                answer = {"failed": str(why)}
            if "us" in answer:
                takers[label] = partial(_turn, ask, mine)
                outcomes[label].tokens[metric] = mine["tokens"] if request["do"] == "prefill" else mine["batch"]
            else:
                outcomes[label].timings[metric] = Timing(why_not=answer.get("failed") or answer.get("refused"))
        timings, others = take_turns_quietly(workers, takers, rounds=2, seconds=0.0)
        made.others[f"{name}, {metric}"] = others
        for label, timing in timings.items():
            outcomes[label].timings[metric] = timing
        rates = ", ".join(f"{label} {outcome.rate(metric) or 0:.1f}" for label, outcome in outcomes.items())
        print(f"  {name}: {metric}: {rates}", file=sys.stderr, flush=True)
        keep(made)


def _turn(ask: Any, request: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
    answer: Mapping[str, Any] = ask(**request)
    return answer


def goals(made: Mixtures) -> list[MoeGoal]:
    """Each goal for each shape."""
    found = []
    for name, outcomes in made.outcomes.items():
        for metric, (beside_float, beside_llama) in SPEED_GOALS.items():
            rates = {label: outcome.rate(metric) for label, outcome in outcomes.items()}
            ours = rates.get(OURS)
            for beside, goal in ((FLOAT, beside_float), (LLAMA, beside_llama)):
                theirs = rates.get(beside)
                found.append(MoeGoal(shape=name, text=metric, beside=beside, goal=goal,
                                     value=ours / theirs if ours and theirs else None))
        peak = made.peak.get(name)
        found.append(MoeGoal(shape=name, text="peak memory added", beside="bf16 weights", goal=MEMORY_GOAL,
                             value=peak / SHAPES[name].float_bytes if peak else None, at_most=True))
    return found


def text(made: Mixtures) -> str:
    """Speeds with their spread, memory, and the goals."""
    parts = []
    for name, outcomes in made.outcomes.items():
        rows, notes = [[f"{name}, tokens a second", *METRICS, "peak MB", "load s"]], []
        for label, outcome in outcomes.items():
            cells = [label]
            for metric in METRICS:
                rate, timing = outcome.rate(metric), outcome.timings.get(metric)
                cells.append(f"{rate:.1f} ±{timing.spread:.0f}%" if rate and timing else "-")
                if timing is not None and timing.why_not:
                    notes.append(f"  {label}, {metric}: {timing.why_not}")
            rows.append([*cells, f"{outcome.peak / 1e6:.0f}" if outcome.peak else "-",
                         f"{outcome.load_s:.1f}" if outcome.load_s else "-"])
            notes += [f"  {label}: {outcome.why_not}"] if outcome.why_not else []
        parts += [aligned(rows), *notes]
    parts += [f"  {where}: other processes used {cores:.1f} cores" for where, cores in made.others.items()
              if cores > BUSY_LIMIT]
    parts += [f"  qpass: activations between products in {our_dtype()}",
              f"  torch bf16: prompt of {FLOAT_PREFILL} tokens, not compiled",
              f"  speeds and these peaks with {TIMED_LAYERS} layers; peaks: what loading and one token added to the "
              "process, of llama.cpp the whole process",
              *(f"  {name}: the whole quantized model adds {peak / 1e6:.0f} MB to a process, its bfloat16 weights are "
                f"{SHAPES[name].float_bytes / 1e6:.0f} MB" for name, peak in made.peak.items() if peak), ""]
    rows = [["goal", "shape", "beside", "to reach", "measured", "result"], *map(_goal_row, goals(made))]
    return "\n".join([*parts, aligned(rows, left=3)])


def _goal_row(goal: MoeGoal) -> list[str]:
    result = "not measured" if goal.reached is None else "reached" if goal.reached else "not reached"
    return [goal.text, goal.shape, goal.beside, f"{'<=' if goal.at_most else '>='} {goal.goal:g}x",
            "" if goal.value is None else f"{goal.value:.2f}x", result]


def as_data(made: Mixtures) -> dict[str, Any]:
    """The numbers for JSON; goals as they came out."""
    return {**asdict(made), "goals": [{**asdict(goal), "reached": goal.reached} for goal in goals(made)]}
