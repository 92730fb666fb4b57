"""Report: a quantized model in, one row a layer out: rule, scheme, kernel, refusals, bytes, and what was fused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from qpass.errors import QPassError
from qpass.experts_spec import ExpertsSpec
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedWeight
from qpass.layers.reordered_linear import ReorderedLinear
from qpass.plan_model import Plan
from qpass.reports.table import render_html, render_report
from qpass.rows import PlanRow, ReportRow
from qpass.spec import LinearSpec

_Spec = LinearSpec | ExpertsSpec | None
_NOT_COMPILED = "in the kernel (not compiled)"
_BETWEEN = "in the kernel, between the two products"


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
    plan = getattr(model, "__dict__", {}).get("_qpass_plan") or _graph_meta(model).get("qpass_plan")
    if not isinstance(plan, Plan):
        raise QPassError(_not_ours(model))
    layers, told = _layers(model), _told(model)
    rows = tuple(_row(row, layers, told) for row in plan.rows)
    return Report(rows=rows, recipe=plan.recipe.to_dict(), capture=plan.capture_method, notes=plan.notes)


def _not_ours(model: Any) -> str:
    loaded = getattr(getattr(model, "config", None), "quantization_config", None)
    if loaded is not None:
        return (f"nothing to explain: Transformers loaded this model by its own means ({type(loaded).__name__}), and "
                "no kernel of qpass runs in it; from_pretrained(path, quantization_config=qpass.QPassConfig()) or "
                "qpass.load(path) gives the same checkpoint with qpass's layers")
    return ("this model was not quantized by qpass: nothing to explain; qpass.plan(model, recipe) tells what would be "
            "done")


def _graph_meta(model: Any) -> dict[str, Any]:
    return dict(getattr(getattr(model, "graph_module", None), "meta", {}))


def _layers(model: Any) -> dict[str, tuple[_Spec, int]]:
    """Path of the layer, or of the parameter where that was replaced -> its spec and the bytes of its packed weight.

    Of experts, the first weight stands for the whole, whose input it reads; the second has a spec of its own.
    """
    if not isinstance(model, nn.Module):
        return dict(_graph_meta(model).get("qpass_packed", {}))
    found: dict[str, tuple[_Spec, int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedWeight):
            found[name] = (module.spec, module.nbytes)
        elif isinstance(module, QuantExperts):
            whole = module.blocks[0].spec
            found |= {f"{name}.{leaf}": (whole if module.site.is_first(leaf) else whole.down, module.part_bytes(leaf))
                      for leaf in module.site.parameters}
    return found


def _told(model: Any) -> dict[str, str]:
    """Path of a layer that changes its input -> how, in words."""
    modules = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    return {name: module.told for name, module in modules if isinstance(module, ReorderedLinear)}


def _row(row: PlanRow, layers: dict[str, tuple[_Spec, int]], told: dict[str, str]) -> ReportRow:
    path = row.name if row.name in layers else row.name.rpartition(".")[0]
    facts = asdict(row)
    if row.status != "quantize" or path not in layers:
        status: Literal["kept", "refused"] = "refused" if row.status == "refuse" else "kept"
        facts.update(status=status, bytes_after=row.bytes_before)
        if row.status == "quantize":
            facts.update(reason="still float: quantize was interrupted before this layer", kernel=None, effective=None)
        return ReportRow(**facts)
    spec, nbytes = layers[path]
    if row.kind == "embedding":  # its rows are read from the head, where they are counted
        return ReportRow(**{**facts, "status": "quantized", "kernel": None})
    facts.update(status="quantized", bytes_after=nbytes)
    if row.kind == "experts":
        facts.update(activation=_experts_activation(row, spec), bytes_an_expert=nbytes // row.shape[0],
                     bytes_a_token=nbytes)
    else:
        assert isinstance(spec, LinearSpec)
        facts.update(kernel=spec.kernel, bytes_a_token=nbytes, activation=_activation(path, spec),
                     reason="; ".join(filter(None, (row.reason, told.get(path)))))
    return ReportRow(**facts)


def _experts_activation(row: PlanRow, spec: _Spec) -> str:
    """The first weight's activation is quantized once per token, the second's inside the kernel."""
    if isinstance(spec, ExpertsSpec):
        return _activation(row.name.rpartition(".")[0], spec)
    return "not quantized" if spec is None or spec.activation is None else _BETWEEN


def _activation(path: str, spec: _Spec) -> str:
    from qpass.lowering.record import for_site

    part = spec.up if isinstance(spec, ExpertsSpec) else spec
    if part is None or part.activation is None:
        return "not quantized"
    seen = for_site(path, str(spec))
    return _NOT_COMPILED if seen is None else seen.activation
