"""Timing on a GPU: functions of one product on rotating weights in, median microseconds of each out, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run goes on: a GPU, or with `dry` the CPU, where Triton interprets and times mean nothing."""

    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def l2_bytes(self) -> int:
        return 0 if self.dry else int(torch.cuda.get_device_properties(0).L2_cache_size)

    def copies(self, nbytes: int) -> int:
        """How many different weights of `nbytes` a round must use, so that none is still in the L2 cache."""
        return 1 if self.dry else max(2, min(64, -(-4 * self.l2_bytes // max(nbytes, 1))))


def interleaved(machine: Machine, lanes: dict[str, Sequence[Callable[[], Any]]]) -> dict[str, float]:
    """Microseconds of one call of each lane, a lane being the same call on different weights.

    Each lane is captured in a CUDA graph, so that what Python takes is not measured; where that fails it is called
    eagerly. Rounds of the lanes alternate, and the median of ROUNDS counts.
    """
    ready = {name: _captured(machine, calls) for name, calls in lanes.items()}
    times: dict[str, list[float]] = {name: [] for name in lanes}
    for _ in range(1 if machine.dry else ROUNDS):
        for name, (run, count) in ready.items():
            times[name].append(_microseconds(machine, run) / count)
    return {name: statistics.median(found) for name, found in times.items()}


def _captured(machine: Machine, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], int]:
    def once() -> None:
        for call in calls:
            call()

    once()
    if machine.dry:
        return once, len(calls)
    repeat = max(1, 32 // len(calls))
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeat):
                once()
        return graph.replay, len(calls) * repeat
    except Exception as error:
        print(f"    (no CUDA graph: {type(error).__name__}: {str(error).splitlines()[0][:120]}; called eagerly)")
        torch.cuda.synchronize()
        return once, len(calls)


def _microseconds(machine: Machine, run: Callable[[], Any]) -> float:
    if machine.dry:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    run()
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return float(start_event.elapsed_time(end_event)) * 1000


def bandwidth(machine: Machine) -> float:
    """Gigabytes a second that a large copy reads and writes."""
    size = 1 << 12 if machine.dry else 1 << 30
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    took = interleaved(machine, {"copy": [lambda: target.copy_(source)]})["copy"]
    return 2 * size / took / 1000
