"""Prepare: a model, its plan and the user's data in; a calibration that is ready to run, everything checked, out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from qpass.calibrate.blocks import find_blocks
from qpass.calibrate.mix_inputs import find_mixed
from qpass.calibrate.pairs import find_pairs
from qpass.calibrate.probe import drawn_samples
from qpass.calibrate.rotate import rotate
from qpass.calibrate.rotate_heads import rotate_heads
from qpass.calibrate.run import Bar, Calibration, Install, Limits, aimed_at, without_data
from qpass.calibrate.samples import Sample, read_samples
from qpass.capture.capture_model import Capture, capture
from qpass.decide.decision import Decision
from qpass.errors import RecipeError
from qpass.plan_model import Plan
from qpass.recipes.algorithm_table import Algorithm
from qpass.recipes.rotation import Rotation


def check_data(algorithms: Sequence[Algorithm], given: bool) -> None:
    """Raise RecipeError if data is missing for an algorithm."""
    asking = [algorithm.name for algorithm in algorithms if algorithm.needs_data]
    if asking and not given:
        raise RecipeError(f"the recipe asks for {', '.join(asking)}, which needs data: pass calibration=..., a list of "
                          "model inputs or of texts, or the path of a text file")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What `quantize` was given for calibration; `prepare` reads and checks it before anything is changed.

    `captured` is the model as it is now.
    """

    model: nn.Module
    plan: Plan
    captured: Capture
    example_inputs: Any
    data: Any
    tokenizer: Any
    num_samples: int
    max_seq_length: int
    limits: Limits

    def inputs(self) -> list[Any] | None:
        """The data as inputs of the model, for static scales alone; None if none was given."""
        if self.data is None:
            return None
        data = self.data if isinstance(self.data, (str, Path)) else list(islice(self.data, self.num_samples))
        if isinstance(data, list) and not any(isinstance(item, (str, Path)) for item in data):
            return data
        samples = read_samples(data, self.model, tokenizer=self.tokenizer, num_samples=self.num_samples,
                               max_seq_length=self.max_seq_length)
        return [sample.args if sample.args else sample.kwargs for sample in samples]

    def prepare(self) -> Prepared:
        """What changes the model as a whole is done here, once all is checked.

        Raises CalibrationError for data that cannot be used, UnmatchedRule for an algorithm's target.
        """
        targets = [decision for decision in self.plan.decisions
                   if decision.status == "quantize" and decision.site.kind == "linear"]
        steps = self.plan.recipe.algorithms
        aimed = aimed_at([step for step in steps if not step.whole_model], self.plan.decisions)
        names = ", ".join(step.name for step in steps)
        static = [d.site.name for d in targets if d.spec is not None and d.spec.activation is not None
                  and d.spec.activation.static]
        if static and self.data is None:
            raise RecipeError(f"{len(static)} layers have static activation scales, the first is {static[0]}, which "
                              "need data: pass calibration=...")
        samples, seen = self._samples(max((step.drawn_tokens for step in steps), default=0))
        turned, mixed = self._turn(samples)
        if not samples or not (aimed or static):
            return Prepared(model=self.model, targets=targets, aimed=aimed, calibration=None, told=names, notes=turned,
                            mixed=mixed)
        captured = capture(self.model, self.example_inputs) if turned else self.captured
        blocks = find_blocks(captured, [decision.site for decision in targets])
        experts = {site: [d for d in self.plan.decisions if d.site.experts == site] for site in dict.fromkeys(
            d.site.experts for d in self.plan.decisions if d.site.experts is not None and d.status == "quantize")}
        run = Calibration(self.model, blocks, targets, aimed, samples, self.limits, find_pairs(captured), experts,
                          mixed)
        told = f"{names} on {seen}, {len(blocks)} blocks"
        return Prepared(model=self.model, targets=targets, aimed=aimed, calibration=run, told=told, notes=turned,
                        mixed=mixed)

    def _turn(self, samples: Sequence[Sample]) -> tuple[tuple[str, ...], dict[str, int]]:
        """Rotate the model if the recipe says so; notes, and the sites that are to mix their inputs."""
        settings = next((step for step in self.plan.recipe.algorithms if isinstance(step, Rotation)), None)
        if settings is None:
            return (), {}
        notes: list[str] = []
        mixed: dict[str, int] = {}
        captured, sample = self.captured, next(iter(samples), None)
        if "R1" in settings.rotations:
            quantized = {d.site.name for d in self.plan.decisions if d.status == "quantize"}
            notes += rotate(self.model, captured, sample, self.limits.seed, quantized)
        if "R2" in settings.rotations:
            notes += rotate_heads(self.model, captured, sample, self.limits.seed)
        if "R4" in settings.rotations:
            mixed, told = find_mixed(captured, self.plan.decisions, settings.block)
            notes += told
        return tuple(notes), mixed

    def _samples(self, drawn_tokens: int) -> tuple[Sequence[Sample], str]:
        """The user's data or, without any, tokens drawn at random, none if the model takes no tokens; and its name."""
        if self.data is None:
            drawn = drawn_samples(self.model, self.example_inputs, drawn_tokens, self.limits.seed)
            return drawn, f"{drawn_tokens} tokens drawn at random"
        found = read_samples(self.data, self.model, tokenizer=self.tokenizer, num_samples=self.num_samples,
                             max_seq_length=self.max_seq_length)
        return found, f"{len(found)} samples"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A calibration that is ready: call it with what takes the results. `told` says in words what it is, `notes` what
    was done to the model as a whole; `mixed` sites mix their inputs in blocks of so many channels."""

    model: nn.Module
    targets: list[Decision]
    aimed: dict[Algorithm, frozenset[str]]
    calibration: Calibration | None
    told: str
    notes: tuple[str, ...] = ()
    mixed: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, install: Install, bar: Bar) -> list[str]:
        """Calibrate and install every target; returns notes for the report."""
        if self.calibration is None:
            return without_data(self.model, self.targets, self.aimed, install, self.mixed)
        inside = {name for block in self.calibration.blocks for name in block.sites}
        rest = [decision for decision in self.targets if decision.site.name not in inside]
        if not any(algorithm.needs_data for algorithm in self.aimed):
            notes = without_data(self.model, rest, self.aimed, install, self.mixed)
            return notes + self.calibration.run(install, bar)
        for decision in rest:
            install(decision, None, None)
        notes = [f"{decision.site.name}: the example inputs never reached it; rounded to nearest without data"
                 for decision in rest]
        return notes + self.calibration.run(install, bar)
