"""Rows: what a plan and a report say of one site, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qpass.site import Kind


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One site of a plan; `reason` is a sentence wherever the outcome is not simply what the rule asked."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    status: Literal["quantize", "keep", "refuse"]
    rule: str
    scheme: str | None = None
    effective: str | None = None
    group_size: int | None = None
    reason: str = ""
    kernel: str | None = None
    refusals: dict[str, str] = field(default_factory=dict)
    shared_input: int | None = None
    produced_by: str | None = None
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One site of a report. `activation` begins, after a compile, with `fused into`, `shared with` or `alone:`."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    status: Literal["quantized", "kept", "refused"]
    rule: str
    scheme: str | None = None
    effective: str | None = None
    group_size: int | None = None
    reason: str = ""
    kernel: str | None = None
    refusals: dict[str, str] = field(default_factory=dict)
    shared_input: int | None = None
    produced_by: str | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    activation: str = ""
