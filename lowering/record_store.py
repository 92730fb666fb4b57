"""Record store: site records on disk beside Inductor's cache, so that a cached compile can still be explained."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpass.lowering.record import SiteRecord

_FILES_READ = 512  # newest first; one file holds one graph's sites


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from qpass.lowering.fingerprint import pipeline_fingerprint

    return Path(cache_dir()) / "qpass_records" / pipeline_fingerprint()[:32]


def write(records: Sequence[SiteRecord]) -> None:
    """Put the records of one graph on disk; a disk that refuses is no reason to fail."""
    lines = [json.dumps(asdict(one), sort_keys=True) for one in records]
    name = hashlib.sha256("\n".join(f"{one.site} {one.spec}" for one in records).encode()).hexdigest()[:32]
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            file.write("\n".join(lines))
        os.replace(file.name, folder / f"{name}.jsonl")
    except (OSError, ImportError):
        return


def read(kind: type[SiteRecord]) -> list[SiteRecord]:
    """Every record on disk that the pipeline as it stands wrote, the oldest first."""
    found: list[SiteRecord] = []
    try:
        files = sorted(_folder().glob("*.jsonl"), key=lambda p: p.stat().st_mtime, reverse=True)[:_FILES_READ]
    except (OSError, ImportError):
        return found
    for path in reversed(files):
        try:
            for line in path.read_text().splitlines():
                fields: dict[str, Any] = json.loads(line)
                found.append(kind(**{**fields, "merged_with": tuple(fields["merged_with"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # half written by an older version, or damaged: the rest still counts
    return found
