"""Configs: the sizes of a product in, the block sizes of the program that computes it out; tables, and no trying.

The tables are starting points by reasoning, not by measurement: at few rows a program waits for weights, so that many
small ones must be under way (narrow blocks, K split between programs); at many rows it waits for the tensor cores, so
that blocks are square. `tuning` measures a few neighbours where a user asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of a typical GPU of each capability; how far K is split need not be exact."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Block sizes (powers of two), parts of K, warps of a program, and steps loaded ahead."""

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a choice depends on. `kind` is what the tensor cores multiply: `half`, `int8`, `fp8` or `float`.

    m      rows of x, or the bucket they are in
    n, k   sizes of the weight, of all weights of a list together
    step   the largest step along K that groups allow, 0 for any
    halves whether two weights share a byte
    """

    kind: str
    m: int
    n: int
    k: int
    step: int
    halves: bool
    capability: int
    grouped: bool = False


def bucket(m: int) -> int:
    """16, 32, 64, 128, 256, ...: the rows for which choices are made and kept; the first that holds `m`."""
    found = 16
    while found < m and found < 4096:
        found *= 2
    return found


def rows_of(m: Any) -> int:
    """How many rows a choice should suit: `m`, or the example that a symbolic size was traced with; sets no guard."""
    if isinstance(m, int):
        return m
    hint = getattr(getattr(m, "node", None), "hint", None)
    return hint if isinstance(hint, int) else 16


# block_m, block_n, block_k, warps, stages; the first line whose rows suffice. block_k is cut to what groups allow.
_FEW = {"half": (16, 64, 128, 4, 4), "int8": (16, 64, 128, 4, 4), "fp8": (16, 64, 128, 4, 4),
        "float": (16, 32, 32, 4, 2)}
_TABLES: dict[int, dict[str, tuple[tuple[int, tuple[int, int, int, int, int]], ...]]] = {
    80: {"half": ((32, (32, 64, 128, 4, 3)), (64, (64, 64, 64, 4, 3)), (4096, (128, 128, 64, 8, 3))),
         "int8": ((32, (32, 64, 128, 4, 3)), (64, (64, 64, 128, 4, 3)), (4096, (128, 128, 128, 8, 3)))},
    89: {"half": ((32, (32, 64, 128, 4, 3)), (64, (64, 64, 64, 4, 3)), (4096, (128, 64, 64, 4, 3))),
         "int8": ((32, (32, 64, 128, 4, 3)), (64, (64, 64, 128, 4, 3)), (4096, (128, 128, 128, 8, 2))),
         "fp8": ((32, (32, 64, 128, 4, 3)), (64, (64, 64, 128, 4, 3)), (4096, (128, 128, 128, 8, 2)))},
    90: {"half": ((32, (32, 64, 128, 4, 4)), (64, (64, 64, 128, 4, 4)), (4096, (128, 128, 64, 8, 3))),
         "int8": ((32, (32, 64, 128, 4, 4)), (64, (64, 128, 128, 4, 4)), (4096, (128, 128, 128, 8, 3))),
         "fp8": ((32, (32, 64, 128, 4, 4)), (64, (64, 128, 128, 4, 4)), (4096, (128, 128, 128, 8, 3)))},
}


@lru_cache(maxsize=1024)
def default_config(problem: Problem) -> Config:
    """The table's choice. Holds for every problem that no kernel refuses: block_k divides what groups allow."""
    m = bucket(problem.m)
    chosen = _FEW[problem.kind]
    if m > 16 and problem.kind != "float":
        tables = _TABLES[max(known for known in _TABLES if known <= max(problem.capability, 80))]
        rows = tables.get(problem.kind, tables["half"])
        chosen = next((sizes for least, sizes in rows if m <= least), rows[-1][1])
    block_m, block_n, block_k, warps, stages = chosen
    return fitted(problem, Config(block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages))


def fitted(problem: Problem, config: Config) -> Config:
    """`config` with a step that the groups allow, and K split so that two programs fall on each multiprocessor."""
    least = 64 if problem.halves else 32
    block_k = max(config.block_k, least)
    if problem.step:
        block_k = min(block_k, problem.step)
    blocks = -(-problem.n // config.block_n) * -(-problem.m // config.block_m)
    steps = -(-problem.k // block_k)
    splits = 1
    if not problem.grouped and problem.m <= 64:
        wanted = 2 * PROCESSORS.get(problem.capability, 108)
        while splits < 8 and blocks * splits * 2 <= wanted and steps >= splits * 2 * 4:
            splits *= 2
    return Config(block_m=config.block_m, block_n=config.block_n, block_k=block_k, splits=splits, warps=config.warps,
                  stages=config.stages)
