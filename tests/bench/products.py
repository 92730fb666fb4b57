"""Products: the tables of cells.py in, every product timed in turn with its peers out, as numbers for the report.

usage: python tests/bench/run.py --only kernels
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cells import ROTATE, SHAPES, TABLES, TOKENS, Column, Table
from peers import PEERS, Found
from turns import Take, Timing, Worker, WorkerDied, take_turns_quietly

TOO_SLOW_S = 2.0
"""A call that would take longer, as judged from a smaller product, is not made unless everything is asked for."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What was measured of one product: the timing of each column, and how many cores other processes used."""

    table: str
    m: int
    n: tuple[int, ...]
    k: int
    others: float
    timings: Mapping[str, Timing]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time: all shapes and forms, or fewer; how long a turn is."""

    full: bool = False
    seconds: float = 0.1
    tables: Sequence[str] = ()
    shapes: int | None = None
    tokens: Sequence[int] = ()
    rotate: int = ROTATE


class Bench:
    """The workers of one run. Use as a context: they end with it."""

    def __init__(self, found: Found, threads: int, options: Options, tables: Sequence[Table] = TABLES) -> None:
        needed = {column.peer for table in tables for column in table.columns}
        self.found, self.options = found, options
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.why_not: dict[str, dict[str, str]] = {}
        self.began = time.perf_counter()
        self.pace: dict[str, dict[int, float]] = {}
        self.threads = threads
        for name in (peer for peer in found.commands if PEERS[peer].serves and peer in needed):
            try:
                self._start(name)
            except WorkerDied as why:
                found.missing[name] = f"does not start here: {why}"

    def _start(self, name: str) -> None:
        worker = Worker(self.found.commands[name], PEERS[name].environment(self.found.root, self.threads))
        hello = worker.ask(do="hello")
        self.workers[name] = worker
        self.versions[name], self.why_not[name] = hello["versions"], hello["refuses"]

    def ask(self, name: str, **request: Any) -> dict[str, Any]:
        """Ask a peer's worker; one that dies is started again, without the lanes that it had."""
        try:
            return self.workers[name].ask(**request)
        except WorkerDied as why:
            self.workers.pop(name).close()
            self._start(name)
            return {"failed": f"the process ended: {why}"}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def table(self, table: Table) -> Iterator[Cell]:
        """Every cell of a table, each when it has been timed."""
        table = _whole(table) if self.options.full else table
        for n, k in table.shapes[:self.options.shapes]:
            yield from self._shape(table, n, k)

    def _shape(self, table: Table, n: tuple[int, ...], k: int) -> Iterator[Cell]:
        ms = [m for m in table.tokens if not self.options.tokens or m in self.options.tokens]
        ready: dict[str, float] = {}
        why_not: dict[str, str] = {}
        for column in table.columns:
            answer = self._prepare(column, n, k, ms)
            if "bytes" in answer:
                ready[column.label] = answer["bytes"]
            else:
                why_not[column.label] = answer.get("refused") or answer.get("failed") or answer["missing"]
        for m in ms:
            yield self._cell(table, n, k, m, ready, why_not)
        for name in list(self.workers):
            self.ask(name, do="drop")

    def _prepare(self, column: Column, n: tuple[int, ...], k: int, ms: Sequence[int]) -> dict[str, Any]:
        if column.peer not in self.workers:
            return {"missing": self.found.missing[column.peer]}
        if column.variant in self.why_not[column.peer]:
            return {"refused": self.why_not[column.peer][column.variant]}
        return self.ask(column.peer, do="prepare", lane=column.label, variant=column.variant, k=k,
                        n=[sum(n)] if column.joined else n, ms=ms, rotate=self.options.rotate)

    def _expected_s(self, label: str, m: int, weights: int) -> float:
        """Seconds of a call, from what the column took for as many tokens, or for the most that were fewer."""
        known = [(tokens, pace) for tokens, pace in self.pace.get(label, {}).items() if tokens <= m]
        return max(known)[1] * m * weights if known else 0.0

    def _turn(self, column: Column, m: int, k: int, seconds: float) -> Mapping[str, Any]:
        return self.ask(column.peer, do="time", lane=column.label, m=m, k=k, seconds=seconds)

    def _cell(self, table: Table, n: tuple[int, ...], k: int, m: int, ready: Mapping[str, float],
              why_not: Mapping[str, str]) -> Cell:
        here = dict(why_not)
        takers: dict[str, Take] = {}
        for column in table.columns:
            expected = self._expected_s(column.label, m, sum(n) * k)
            if column.label in ready and not self.options.full and expected > TOO_SLOW_S:
                here[column.label] = f"slow: about {expected:.0f} s a call"
            elif column.label in ready:
                takers[column.label] = partial(self._turn, column, m, k)
        rounds, seconds = (3, self.options.seconds) if m <= 16 else (3, self.options.seconds / 2)
        timings, others = take_turns_quietly(list(self.workers.values()), takers, rounds=rounds, seconds=seconds)
        for label, timing in timings.items():
            if timing.median_us is None:
                here[label] = timing.why_not or "no answer"
            else:
                self.pace.setdefault(label, {})[m] = timing.median_us / 1e6 / (m * sum(n) * k)
        every = {column.label: replace(timings[column.label], nbytes=ready[column.label])
                 if column.label in timings and timings[column.label].median_us else Timing(why_not=here[column.label])
                 for column in table.columns}
        cell = Cell(table=table.name, m=m, n=n, k=k, others=others, timings=every)
        print(f"{time.perf_counter() - self.began:6.0f} s  {table.name} M={m} {'+'.join(map(str, n))}x{k}",
              file=sys.stderr, flush=True)
        return cell


Versions = dict[str, dict[str, str]]


def run(found: Found, threads: int, options: Options, keep: Callable[[Sequence[Cell], Versions], None]
        ) -> tuple[list[Cell], Versions]:
    """All tables that are asked for, and the versions of what was timed; after each cell `keep` is given all so far."""
    wanted = [table for table in TABLES if not options.tables or table.name in options.tables]
    cells: list[Cell] = []
    with Bench(found, threads, options, wanted) as bench:
        for cell in (cell for table in wanted for cell in bench.table(table)):
            cells.append(cell)
            keep(cells, bench.versions)
        return cells, bench.versions


def _whole(table: Table) -> Table:
    several = any(len(n) > 1 for n, _ in table.shapes)
    return replace(table, tokens=TOKENS, shapes=table.shapes if several else tuple(((n,), k) for n, k in SHAPES))
