"""Harness: candidates in, timed side by side, a table with medians, spread and ratios out, and JSON beside it.

Every candidate gets its own copies of one set of weights, enough of them to leave the caches; candidates take turns
call by call, so that a slow stretch of the machine slows all of them; the output of each candidate is checked against
float64 before its time counts.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

Product = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to time: `prepare(weights)`, each float32 [N, K], gives the call x -> [x @ w.T for w in weights].

    `bits` is what a weight takes, scales included. `tolerance` bounds |y - x @ w.T| / |x @ w.T| in the Frobenius norm.
    """

    name: str
    prepare: Callable[[Sequence[Tensor]], Product]
    bits: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is timed: M tokens [M, K] times weights [N, K], one for each N."""

    label: str
    m: int
    n: tuple[int, ...]
    k: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One candidate in one cell: microseconds a call with quartiles, and its measured error."""

    candidate: str
    cell: Cell
    median_us: float
    low_us: float
    high_us: float
    calls: int
    error: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, in percent of the median."""
        return (self.high_us - self.low_us) / 2 / self.median_us * 100


@torch.inference_mode()
def time_cell(candidates: Sequence[Candidate], cell: Cell, *, seconds: float, rotate_bytes: int) -> list[Timing]:
    """Time every candidate for about `seconds` altogether. Raises AssertionError on a wrong output."""
    draw = torch.Generator().manual_seed(cell.m * 7919 + sum(cell.n) * 31 + cell.k)
    weights = [torch.randn(n, cell.k, generator=draw) / cell.k**0.5 for n in cell.n]
    x = torch.randn(cell.m, cell.k, generator=draw).to(torch.bfloat16)
    truth = torch.cat([x.double() @ weight.double().t() for weight in weights], dim=1)
    lanes: list[list[Product]] = []
    errors: list[float] = []
    for candidate in candidates:
        copies = max(1, min(256, int(rotate_bytes / (sum(cell.n) * cell.k * candidate.bits / 8))))
        lanes.append([candidate.prepare(weights) for _ in range(copies)])
        errors.append(float((torch.cat(list(lanes[-1][0](x)), dim=1).double() - truth).norm() / truth.norm()))
        assert errors[-1] <= candidate.tolerance, f"{candidate.name} is wrong in {cell}: error {errors[-1]:.3g}"
    spans: list[list[float]] = [[] for _ in candidates]
    turn, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < 5:
        for lane, span in zip(lanes, spans, strict=True):
            call = lane[turn % len(lane)]
            start = time.perf_counter()
            call(x)
            span.append((time.perf_counter() - start) * 1e6)
        turn += 1
    return [_timing(c, s, e, cell) for c, s, e in zip(candidates, spans, errors, strict=True)]


def _timing(candidate: Candidate, spans: list[float], error: float, cell: Cell) -> Timing:
    kept = spans[1:]
    low, median, high = statistics.quantiles(kept, n=4)
    return Timing(candidate=candidate.name, cell=cell, median_us=median, low_us=low, high_us=high, calls=len(kept),
                  error=error)


def machine() -> str:
    """This machine and the versions that matter, in one line."""
    name = platform.processor() or platform.machine()
    try:
        name = next(line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    from qpass.kernels.isa import machine_has

    level = machine_has()[0] if machine_has() else platform.machine()
    return (f"{name}, {level}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
            f"Python {platform.python_version()}")


def write_json(path: Path, timings: Sequence[Timing], **more: object) -> None:
    """Keep the numbers: machine, date and every timing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **more, "timings": [asdict(t) for t in timings]}
    path.write_text(json.dumps(data, indent=1) + "\n")


def print_table(timings: Sequence[Timing], *, subject: str, peers: Sequence[str]) -> None:
    """One line a cell: each candidate's median with its spread, then the speed of `subject` over each peer."""
    names = list(dict.fromkeys(t.candidate for t in timings))
    print(f"{'product':>10} {'M':>4} {'N x K':>19}  " + "  ".join(f"{n:>18}" for n in names) + "  "
          + "  ".join(f"{'x ' + p:>15}" for p in peers))
    for cell in dict.fromkeys(t.cell for t in timings):
        row = {t.candidate: t for t in timings if t.cell == cell}
        shape = f"{'+'.join(map(str, cell.n))}x{cell.k}"
        print(f"{cell.label:>10} {cell.m:>4} {shape:>19}  "
              + "  ".join(f"{row[n].median_us:>9.0f} us ±{row[n].spread:>3.0f} %" for n in names) + "  "
              + "  ".join(f"{row[p].median_us / row[subject].median_us:>15.2f}" for p in peers))
