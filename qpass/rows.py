"""Rows: what a plan and a report say of one site, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qpass.site import Kind


@dataclass(frozen=True, kw_only=True)
class Row:
    """What both say. `reason` is a sentence wherever the outcome is not simply what the rule asked.

    name       the parameter's qualified name
    rule       the text of the rule that matched
    scheme     as asked; None if nothing asked for one
    effective  what really runs here, `w4a8 g64`; None for a layer in float
    refusals   kernel -> the sentence in which it says why not
    bytes_*    of the weight, scales and zero points included; bytes_after is on disk in a plan, in memory in a report,
               where kernels may want codes of 4 or 8 bits; bytes_a_token is what decoding one token reads of it,
               bytes_an_expert what each expert has of it
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
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
    bytes_a_token: int = 0
    bytes_an_expert: int = 0


@dataclass(frozen=True, kw_only=True)
class PlanRow(Row):
    """One site of a plan."""

    status: Literal["quantize", "keep", "refuse"]


@dataclass(frozen=True, kw_only=True)
class ReportRow(Row):
    """One site of a report. `activation` begins, after a compile, with `fused into`, `shared with` or `alone:`."""

    status: Literal["quantized", "kept", "refused"]
    activation: str = ""
