"""Harness: candidates in, timed side by side, a table with medians, spread and ratios out, and JSON beside it.

Every candidate gets its own copies of one weight, enough of them to leave the caches; candidates take turns call by
call, so that a slow stretch of the machine slows all of them; the output of each candidate is checked against float64
before its time counts.
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


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to time. `prepare(weight)` [N, K] float32 gives the call x -> y on its own packed copy of the weight.

    `tolerance` bounds |y - x @ w.T| / |x @ w.T| in the Frobenius norm, against the weight as this candidate rounds it
    if `exact(weight)` is given, else against the float weight.
    """

    name: str
    prepare: Callable[[Tensor], Callable[[Tensor], Tensor]]
    bits: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One cell: microseconds a call, its quartiles, the bytes of weight read per call, and the measured error."""

    candidate: str
    m: int
    n: int
    k: int
    median_us: float
    low_us: float
    high_us: float
    calls: int
    error: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, in percent of the median."""
        return (self.high_us - self.low_us) / 2 / self.median_us * 100

    @property
    def tops(self) -> float:
        return 2 * self.m * self.n * self.k / self.median_us / 1e6


@torch.inference_mode()
def time_cell(candidates: Sequence[Candidate], *, m: int, n: int, k: int, seconds: float,
              rotate_bytes: int) -> list[Timing]:
    """Time every candidate at one shape for about `seconds` altogether. Raises AssertionError on a wrong output."""
    draw = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    weight = torch.randn(n, k, generator=draw) / k**0.5
    x = torch.randn(m, k, generator=draw).to(torch.bfloat16)
    truth = x.double() @ weight.double().t()
    lanes: list[list[Callable[[Tensor], Tensor]]] = []
    errors: list[float] = []
    for candidate in candidates:
        copies = max(1, min(64, int(rotate_bytes / (n * k * candidate.bits / 8))))
        lane = [candidate.prepare(weight) for _ in range(copies)]
        y = lane[0](x).double()
        errors.append(float((y - truth).norm() / truth.norm()))
        assert errors[-1] <= candidate.tolerance, (
            f"{candidate.name} is wrong at M={m} N={n} K={k}: error {errors[-1]:.3g}")
        lanes.append(lane)
    spans: list[list[float]] = [[] for _ in candidates]
    turn, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < 5:
        for lane, span in zip(lanes, spans, strict=True):
            call = lane[turn % len(lane)]
            start = time.perf_counter()
            call(x)
            span.append((time.perf_counter() - start) * 1e6)
        turn += 1
    return [_timing(c, s, e, m, n, k) for c, s, e in zip(candidates, spans, errors, strict=True)]


def _timing(candidate: Candidate, spans: list[float], error: float, m: int, n: int, k: int) -> Timing:
    kept = spans[1:] or spans
    low, median, high = statistics.quantiles(kept, n=4) if len(kept) > 1 else (kept[0],) * 3
    return Timing(candidate=candidate.name, m=m, n=n, k=k, median_us=median, low_us=low, high_us=high, calls=len(kept),
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
    """One line a shape: each candidate's median with its spread, then the speed of `subject` over each peer."""
    names = list(dict.fromkeys(t.candidate for t in timings))
    print(f"{'M':>5} {'N x K':>13}  " + "  ".join(f"{n:>24}" for n in names) + "  "
          + "  ".join(f"{'x ' + p:>16}" for p in peers))
    for shape in dict.fromkeys((t.m, t.n, t.k) for t in timings):
        row = {t.candidate: t for t in timings if (t.m, t.n, t.k) == shape}
        cells = [f"{row[n].median_us:>9.0f} us ±{row[n].spread:>3.0f} %" if n in row else "" for n in names]
        ratios = [f"{row[p].median_us / row[subject].median_us:.2f}" if p in row else "" for p in peers]
        print(f"{shape[0]:>5} {shape[1]:>6}x{shape[2]:<6}  " + "  ".join(f"{c:>24}" for c in cells) + "  "
              + "  ".join(f"{r:>16}" for r in ratios))
