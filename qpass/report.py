"""Report: a quantized model in, one row a layer out: rule, scheme, kernel, refusals, bytes, and what was fused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from qpass.errors import QPassError
from qpass.layers import PackedWeight
from qpass.plan_model import Plan
from qpass.rows import PlanRow, ReportRow
from qpass.table import render_html, render_report

_NOT_COMPILED = "in the kernel (not compiled)"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model. `str()` is an aligned table; layers that differ only in a number share a line."""

    rows: tuple[ReportRow, ...]
    recipe: dict[str, Any]
    capture: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.table()

    def table(self, *, full: bool = False) -> str:
        """The table as text; `full` gives every layer a line of its own."""
        return render_report(self, full=full)

    def to_json(self) -> str:
        """Everything in the report, as JSON."""
        return json.dumps(asdict(self), indent=2, default=str)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page and return its path."""
        return render_html(self, Path(path))

    @property
    def counts(self) -> dict[str, int]:
        """How many sites are quantized, kept and refused."""
        return dict(Counter(row.status for row in self.rows))


def explain(model: Any) -> Report:
    """Say what was done to every site of a quantized model, compiled or not.

    Raises QPassError for a model that qpass did not quantize.
    """
    model = getattr(model, "_orig_mod", model)
    plan = getattr(model, "__dict__", {}).get("_qpass_plan") or getattr(model, "meta", {}).get("qpass_plan")
    if not isinstance(plan, Plan):
        raise QPassError("this model was not quantized by qpass: nothing to explain; qpass.plan(model, recipe) tells "
                         "what would be done")
    packed = {name: module for name, module in model.named_modules(remove_duplicate=False)
              if isinstance(module, PackedWeight)} if isinstance(model, nn.Module) else {}
    rows = tuple(_row(row, packed) for row in plan.rows)
    return Report(rows=rows, recipe=plan.recipe.to_dict(), capture=plan.capture_method, notes=plan.notes)


def _row(row: PlanRow, packed: dict[str, PackedWeight]) -> ReportRow:
    path = row.name if row.name in packed else row.name.rpartition(".")[0]
    layer = packed.get(path) if row.status == "quantize" else None
    facts = asdict(row)
    if layer is None:
        status: Literal["kept", "refused"] = "refused" if row.status == "refuse" else "kept"
        facts.update(status=status, bytes_after=row.bytes_before)
        if row.status == "quantize":
            facts.update(reason="still float: quantize was interrupted before this layer", kernel=None, effective=None)
        return ReportRow(**facts)
    facts.update(status="quantized", kernel=layer.spec.kernel, bytes_after=layer.nbytes,
                 activation=_activation(path, layer))
    return ReportRow(**facts)


def _activation(path: str, layer: PackedWeight) -> str:
    from qpass.lowering.record import for_site

    if layer.spec.activation is None:
        return "not quantized"
    seen = for_site(path)
    return _NOT_COMPILED if seen is None else seen.activation
