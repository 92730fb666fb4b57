"""Turns: workers and a cell in, timings out that were taken in turn, while nothing else was busy.

Every library runs in a process of its own and sleeps while another has its turn: A B C A B C, a burst of calls each.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUSY_LIMIT = 0.2
"""Cores that other processes may use during a cell; above, the cell is taken again."""
TRIES = 3
SETTLE_S = 0.5
"""How long a library's threads may go on looking for work after its turn, at most; libiomp5's do for 0.2 s."""
_TICK = os.sysconf("SC_CLK_TCK")


class WorkerDied(Exception):
    """A worker ended; the text is the end of what it wrote to stderr."""


class Worker:
    """A process that answers requests (see worker.py)."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True, env=dict(environment))

    def ask(self, limit_s: float | None = None, **request: Any) -> dict[str, Any]:
        """Send a request, wait for the answer, and until the process is idle: the next one to run needs its cores.

        Raises WorkerDied; a process that has no answer after `limit_s` seconds is ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        if limit_s is not None and not select.select([self.process.stdout], [], [], limit_s)[0]:
            self.process.kill()
            raise WorkerDied(f"no answer within {limit_s:g} s")
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise WorkerDied(f"exit code {self.process.wait()}: " + " / ".join(self.log.read().splitlines()[-3:]))
        answer: dict[str, Any] = json.loads(line)
        self._settle()
        return answer

    def _settle(self) -> None:
        end = time.perf_counter() + SETTLE_S
        while self._runs() and time.perf_counter() < end:
            time.sleep(0.005)

    def _runs(self) -> bool:
        """Whether a thread of the process has or waits for a processor."""
        for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                if stat.read_text().rpartition(")")[2].split()[0] == "R":
                    return True
        return False

    def cpu_seconds(self) -> float:
        """CPU time of the process and its ended children, 0 once it is gone."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(int(ticks) for ticks in fields[11:15]) / _TICK

    def close(self) -> None:
        """Let it end, or end it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds of a call: median and quartiles of all turns; or why there are none."""

    median_us: float | None = None
    low_us: float = 0.0
    high_us: float = 0.0
    calls: int = 0
    error: float = 0.0
    nbytes: float = 0.0
    why_not: str | None = None

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, in percent of the median."""
        return (self.high_us - self.low_us) / 2 / self.median_us * 100 if self.median_us else 0.0


def machine_busy_seconds() -> float:
    """CPU seconds that the whole machine has spent, time taken by other guests of its host included; 0 if unknown."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(value) for value in file.readline().split()[1:]]
    except OSError:
        return 0.0
    return (sum(ticks[:3]) + sum(ticks[5:8])) / _TICK


def others_busy(workers: Sequence[Worker], run: Callable[[], Any]) -> tuple[float, Any]:
    """Cores that processes other than these (and this one) used while `run` ran, and what it returned."""
    own = sum(os.times()[:4]) + sum(worker.cpu_seconds() for worker in workers)
    machine, start = machine_busy_seconds(), time.perf_counter()
    result = run()
    spent = sum(os.times()[:4]) + sum(worker.cpu_seconds() for worker in workers) - own
    return max(0.0, (machine_busy_seconds() - machine - spent) / (time.perf_counter() - start)), result


Take = Callable[[float], Mapping[str, Any]]


def take_turns(takers: Mapping[str, Take], *, rounds: int, seconds: float) -> dict[str, Timing]:
    """Give each taker `rounds` turns of `seconds`, in turn; a taker answers with {"us": [...]} or why not."""
    spans: dict[str, list[float]] = {name: [] for name in takers}
    errors = dict.fromkeys(takers, 0.0)
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, take in takers.items():
            if name in failed:
                continue
            answer = take(seconds)
            if "us" not in answer:
                failed[name] = next((f"{kind}: {answer[kind]}" if kind != "refused" else answer[kind]
                                     for kind in ("wrong", "refused", "failed") if kind in answer), "no answer")
                continue
            spans[name] += answer["us"]
            errors[name] = max(errors[name], answer.get("error", 0.0))
    return {name: Timing(why_not=failed[name]) if name in failed else _timing(spans[name], errors[name])
            for name in takers}


def take_turns_quietly(workers: Sequence[Worker], takers: Mapping[str, Take], *, rounds: int, seconds: float
                       ) -> tuple[dict[str, Timing], float]:
    """`take_turns`, again while others were busy, up to TRIES times; the quietest, and how many cores others used."""
    best: tuple[float, dict[str, Timing]] | None = None
    for _ in range(TRIES):
        others, timings = others_busy(workers, lambda: take_turns(takers, rounds=rounds, seconds=seconds))
        if best is None or others < best[0]:
            best = others, timings
        if others <= BUSY_LIMIT:
            break
    assert best is not None
    return best[1], best[0]


def _timing(spans: Sequence[float], error: float) -> Timing:
    low, _, high = statistics.quantiles(spans, n=4) if len(spans) > 1 else [spans[0]] * 3
    return Timing(median_us=statistics.median(spans), low_us=low, high_us=high, calls=len(spans), error=error)
