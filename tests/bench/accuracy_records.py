"""Accuracy records: what rows were measured at, kept in a file, so that a run of hours can be stopped and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Size:
    """On what a run measures: the model's folder, tokens of a calibration sample, windows a text."""

    model: str
    length: int
    windows: int


class Records:
    """Records of all runs in one JSON file; with no path, of this run. Those of another size stay as they are."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else []

    def found(self, row: str, size: Size, samples: int) -> dict[str, dict[str, Any]]:
        """A row's records of this size by text; `samples` is what it calibrates on, unless it needs no data."""
        facts = {"row": row, **asdict(size)}
        return {record["text"]: record for record in self.records
                if facts.items() <= record.items() and record["samples"] in (0, samples)}

    def add(self, row: str, size: Size, new: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps a record in the place of the one that it repeats, and writes the file; returns it with its size."""
        record = {"row": row, **asdict(size), **new}
        same = {key: record[key] for key in ("row", *asdict(size), "text", "samples")}
        self.records = [other for other in self.records if not same.items() <= other.items()] + [record]
        if self.path is not None:
            whole = self.path.with_suffix(".partial")
            whole.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
            os.replace(whole, self.path)
        return record
