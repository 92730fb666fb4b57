"""Plan: a model and a recipe in, what quantize would do out; a dry run that reads no weight and touches nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qpass.decide.decide_sites import decide
from qpass.decide.decision import Decision
from qpass.decide.match import entries
from qpass.decide.weight_bytes import stored_bytes
from qpass.errors import AlreadyQuantized
from qpass.recipes.recipe import Recipe
from qpass.recipes.recipe_files import as_recipe
from qpass.reports.footprint import Footprint, footprint_of
from qpass.reports.table import bits_per_weight, render_html, render_plan
from qpass.reports.text_table import human_bytes
from qpass.rows import PlanRow
from qpass.scheme import PRESETS, ActivationArgs
from qpass.spec import LinearSpec, effective_text

if TYPE_CHECKING:
    from qpass.capture.capture_model import Capture

__all__ = ["Decision", "Plan", "Totals", "decide", "make_plan", "plan_captured", "plan_row"]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over a plan's rows; `bits_per_weight` is over the quantized ones, scales and zero points included.

    `bytes_a_token` is what decoding reads for one token: every matrix once (of experts all, though fewer are used), and
    one row of each table.
    """

    quantized: int
    kept: int
    refused: int
    bytes_before: int
    bytes_after: int
    bytes_a_token: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What quantize would do: one row and one decision a site. `str()` is a table, layers of one pattern together."""

    rows: tuple[PlanRow, ...]
    decisions: tuple[Decision, ...]
    recipe: Recipe
    capture_method: str
    notes: tuple[str, ...] = ()
    footprint: Footprint | None = None

    @property
    def asked(self) -> dict[str, ActivationArgs]:
        """What the activations of each quantized weight, by name, should be rounded to, whether or not this machine
        does; without those whose scale must have been measured."""
        return {name: d.scheme.activation for d in self.decisions for name in (d.site.name, *d.site.aliases)
                if d.status == "quantize" and d.scheme is not None and d.scheme.activation is not None
                and d.scheme.activation.dynamic is True}

    @property
    def totals(self) -> Totals:
        """Counts by status, and bytes as stored on disk."""
        status = Counter(row.status for row in self.rows)
        return Totals(quantized=status["quantize"], kept=status["keep"], refused=status["refuse"],
                      bytes_before=sum(row.bytes_before for row in self.rows),
                      bytes_after=sum(row.bytes_after for row in self.rows),
                      bytes_a_token=sum(row.bytes_a_token for row in self.rows),
                      bits_per_weight=bits_per_weight([row for row in self.rows if row.status == "quantize"]))

    def table(self, *, full: bool = False, width: int = 160) -> str:
        """The table, footnotes and summary as text; `full` gives every site a line of its own."""
        table = render_plan(self, full=full, width=width)
        return table if self.footprint is None else f"{table}\n{self.footprint}"

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """The recipe, how layers were found, the totals and every row, as JSON."""
        return json.dumps({"recipe": self.recipe.to_dict(), "capture_method": self.capture_method,
                           "notes": self.notes, "totals": asdict(self.totals),
                           "footprint": None if self.footprint is None else asdict(self.footprint),
                           "rows": [asdict(row) for row in self.rows]}, indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page and return its path."""
        return render_html(self, Path(path))


def make_plan(model: Any, recipe: Any, *, example_inputs: Any = None,
              device: torch.device | None = None) -> Plan:
    """What `quantize(model, recipe)` would do, without doing it; weights may be on the meta device.

    model           or the path of a Hugging Face folder, or a Transformers config: then no weight is read, and the plan
                    has a `footprint` too: bytes on disk, in memory, at most while loading, and a token
    recipe          a preset name, Scheme, Recipe, dict, torchao config, or path to a YAML or JSON recipe
    example_inputs  what one call of the model takes; by default the model's own `dummy_inputs`
    device          where the quantized model will run, for the choice of kernels; by default where its weights are

    Raises AlreadyQuantized, and what reading the recipe, capturing and deciding raise.
    """
    from qpass.capture.capture_model import capture

    wanted = as_recipe(recipe)
    from_outside = not isinstance(model, nn.Module) and (
        isinstance(model, (str, os.PathLike)) or hasattr(model, "model_type"))
    if from_outside:
        from qpass.checkpoints.model_folder import load_meta

        model = load_meta(model)
    _check_float(model)
    plan = plan_captured(model, capture(model, example_inputs), wanted, device)
    return replace(plan, footprint=footprint_of(model, plan.decisions)) if from_outside else plan


def plan_captured(model: Any, captured: Capture, recipe: Recipe, device: torch.device | None = None) -> Plan:
    """`make_plan` of a float model whose capture is known."""
    from qpass.find.find_sites import find

    decisions = decide(find(model, captured), recipe, device=device or _device(model))
    return Plan(rows=tuple(plan_row(d) for d in decisions), decisions=decisions, recipe=recipe,
                capture_method=captured.method,
                notes=(*captured.notes, *_beaten(recipe, decisions), *_wanted_data(recipe), *_float_heads(decisions)))


def plan_row(decision: Decision) -> PlanRow:
    """The row that shows a decision."""
    site, spec = decision.site, decision.spec
    return PlanRow(name=site.name, kind=site.kind, shape=site.shape, status=decision.status, rule=decision.rule,
                   scheme=decision.scheme.name if decision.scheme else None,
                   effective=effective_text(spec) if spec else None,
                   group_size=spec.weight.group_size if spec else None,
                   reason=decision.reason, kernel=decision.kernel or (spec.kernel if spec else None),
                   refusals=decision.refusals,
                   shared_input=site.shared_input, produced_by=site.produced_by,
                   bytes_before=decision.bytes_before, bytes_after=decision.bytes_after,
                   bytes_a_token=decision.bytes_a_token,
                   bytes_an_expert=decision.bytes_after // site.shape[0] if site.kind == "experts" else 0)


def _beaten(recipe: Recipe, decisions: Sequence[Decision]) -> list[str]:
    """Rules that match layers but decide none; those that match nothing at all were errors."""
    used = {decision.rule for decision in decisions}
    return [f"rule {entry.text!r} decides no layer: other rules decide each that it matches"
            for entry in entries(recipe) if entry.text not in used and not entry.default]


def _float_heads(decisions: Sequence[Decision]) -> list[str]:
    """What a head that stays in float costs: where it is more than a tenth of what decoding reads."""
    total = sum(d.bytes_a_token for d in decisions)
    told = []
    for d in decisions:
        head = d.status == "keep" and d.site.kind == "linear" and set(d.site.consumers) <= {"output"}
        if head and any(o.status == "quantize" for o in decisions) and d.bytes_a_token * 10 > total:
            packed = stored_bytes(_int8(d), 1, min(d.site.dtype.itemsize, 4))
            rule = d.site.owner.rpartition(".")[2] or d.site.name
            told.append(f"{d.site.name} in float is {human_bytes(d.bytes_a_token)} of the {human_bytes(total)} that "
                        f"decoding reads a token ({d.bytes_a_token / total:.0%}); a rule {rule} = w8a16 would make it "
                        f"{human_bytes(packed)}")
    return told


def _int8(decision: Decision) -> LinearSpec:
    site, scheme = decision.site, PRESETS["w8a16"]
    weight = replace(scheme.weight, granularity="per_channel", group_size=None) if (
        site.in_features % (scheme.weight.group_size or 1)) else scheme.weight
    return LinearSpec(family=scheme.family, weight=weight, activation=None, out_features=site.out_features,
                      in_features=site.in_features)


def _wanted_data(recipe: Recipe) -> list[str]:
    """Which of the recipe's algorithms will ask for calibration data."""
    asked = ", ".join(algorithm.name for algorithm in recipe.algorithms if algorithm.needs_data)
    return [f"the recipe's {asked} needs data: qpass.quantize(model, recipe, calibration=...)"] if asked else []


def _check_float(model: Any) -> None:
    from qpass.layers.packed_layers import PackedLayer

    if isinstance(model, nn.Module):
        packed = [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]
        if packed:
            raise AlreadyQuantized(f"{len(packed)} layers of this model are quantized by qpass already, the first is "
                                   f"{packed[0]}; qpass.explain(model) tells how, qpass.dequantize(model) goes back")


def _device(model: Any) -> torch.device:
    """Where the weights are; the CPU for a model on the meta device or without parameters."""
    tensors = model.parameters() if isinstance(model, nn.Module) else getattr(model, "state_dict", {}).values()
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
