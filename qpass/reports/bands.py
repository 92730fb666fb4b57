"""Bands: rows of a plan or a report in, groups of rows that say the same of many layers out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$|[^\w.])|^\d+(?=\.)")
_NOT_SAID = ("shared_input", "produced_by")  # tables do not show them, and they differ where layers do not


@dataclass(frozen=True, kw_only=True)
class Band:
    """Rows that differ in nothing but the numbers in their names, `model.layers.{0..29}.mlp.up_proj.weight`."""

    name: str
    rows: tuple[Any, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)


def bands(rows: Sequence[Any]) -> tuple[Band, ...]:
    """Rows grouped by all that they say except indices, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return tuple(band for group in groups.values() for band in _split(group))


def pattern(names: Sequence[str]) -> str:
    """One text for names that differ only in indices: every index that varies becomes the range of its values."""
    columns = iter([sorted(set(column)) for column in zip(*map(_indices, names), strict=True)])

    def shown(index: re.Match[str]) -> str:
        values = next(columns)
        return index.group() if len(values) == 1 else "{" + _ranges(values) + "}"

    return _INDEX.sub(shown, names[0])


def without_indices(text: str) -> str:
    """`layers.3.mlp` as `layers.#.mlp`: equal for texts that differ only in indices."""
    return _INDEX.sub("#", text)


def _key(row: Any) -> tuple[Any, ...]:
    key = []
    for entry in fields(row):
        value = getattr(row, entry.name)
        if entry.name in _NOT_SAID:
            continue
        if isinstance(value, str):
            value = without_indices(value)
        key.append(tuple(sorted(value.items())) if isinstance(value, dict) else value)
    return tuple(key)


def _split(rows: Sequence[Any]) -> list[Band]:
    """One Band if the names' indices are a full product of ranges, otherwise one for every tail of indices."""
    found = [_indices(row.name) for row in rows]
    product = math.prod(len(set(column)) for column in zip(*found, strict=True))
    if product == len(rows) or len(found[0]) < 2:
        return [Band(name=pattern([row.name for row in rows]), rows=tuple(rows))]
    tails: dict[tuple[int, ...], list[Any]] = {}
    for row, index in zip(rows, found, strict=True):
        tails.setdefault(index[1:], []).append(row)
    return [Band(name=pattern([row.name for row in tail]), rows=tuple(tail)) for tail in tails.values()]


def _indices(name: str) -> tuple[int, ...]:
    return tuple(int(m.group()) for m in _INDEX.finditer(name))


def _ranges(values: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(a) if a == b else f"{a}..{b}" if b > a + 1 else f"{a},{b}" for a, b in runs)
