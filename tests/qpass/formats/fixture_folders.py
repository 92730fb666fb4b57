"""Fixture folders: checkpoints that the real tools wrote, each with the weights that the tool itself decodes.

A few lie in the repository (tests/fixtures), all of them beside it (../shared/fixtures) or where QPASS_FIXTURES says.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
SMALL = ROOT / "tests" / "fixtures"


def every_fixture() -> dict[str, Path]:
    """`format/variant` -> its folder; those in the repository are called small: one layer, digests as reference."""
    given = os.environ.get("QPASS_FIXTURES")
    outside = Path(given) if given else ROOT.parent / "shared" / "fixtures"
    found: dict[str, Path] = {}
    for root, suffix in ((SMALL, " (small)"), (outside, "")):
        for folder in sorted(root.glob("*/*")):
            if (folder / "reference.safetensors").is_file() or (folder / "reference.json").is_file():
                found[f"{folder.parent.name}/{folder.name}{suffix}"] = folder
    return found


def digest(weight: Tensor) -> str:
    """SHA-256 of a weight's float32 numbers, -0 as 0: what reference.json has of each."""
    return hashlib.sha256((weight.detach().float() + 0).contiguous().numpy().tobytes()).hexdigest()
