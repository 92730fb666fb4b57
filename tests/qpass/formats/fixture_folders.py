"""Fixture folders: checkpoints that the real tools wrote, each with the weights that the tool itself decodes.

A few lie in the repository (tests/fixtures), all of them beside it (../shared/fixtures) or where QPASS_FIXTURES says.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SMALL = ROOT / "tests" / "fixtures"


def every_fixture() -> dict[str, Path]:
    """`format/variant` -> its folder; those in the repository, then any that lie only outside it."""
    given = os.environ.get("QPASS_FIXTURES")
    outside = Path(given) if given else ROOT.parent / "shared" / "fixtures"
    found: dict[str, Path] = {}
    for root in (SMALL, outside):
        for folder in sorted(root.glob("*/*")):
            if (folder / "reference.safetensors").is_file():
                found.setdefault(f"{folder.parent.name}/{folder.name}", folder)
    return found
