"""Compare: a float model, its quantized twin and one input in, the error of every quantized layer out.

Each layer is judged twice. *Local*: both layers get the quantized model's own input, so only this layer's rounding
counts. *Accumulated*: the layer's output in a run of the quantized model against that in a run of the reference, so
everything before it counts too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import EvaluationError
from qpass.measure.observe import observe_model, observe_reference, pair_layers
from qpass.measure.observe_experts import keep_experts, observe_experts, pair_experts, row_specs


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """How far `got` is from `want`, over all elements: sqnr_db = 10 log10(sum want² / sum (got - want)²).

    relative is the square root of that quotient's inverse, max_abs the largest difference; `nonfinite` counts the
    numbers that are NaN or Inf only in `got`.
    """

    sqnr_db: float
    max_abs: float
    relative: float
    nonfinite: int = 0


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One quantized layer, or one projection of a layer of experts, in the order of execution; `wrong` says why it is,
    or is empty."""

    name: str
    spec: str
    calls: int
    local: LayerError
    accumulated: LayerError
    wrong: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every quantized layer of a model against its reference, and the two outputs; `str()` is an aligned table."""

    rows: tuple[ComparisonRow, ...]
    output: LayerError
    never_called: tuple[str, ...]
    threshold_db: float

    @property
    def first_wrong(self) -> ComparisonRow | None:
        """The first layer, in the order of execution, that goes wrong by itself."""
        return next((row for row in self.rows if row.wrong), None)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [24])
        group = f"{'layer':<{width}}  {'local: SQNR dB':>14} {'max error':>10} {'relative':>9}  "
        lines = [group + f"{'accumulated: SQNR dB':>20} {'max error':>10} {'relative':>9}"]
        lines += [f"{row.name:<{width}}  {_cells(row.local, 14)}  {_cells(row.accumulated, 20)}"
                  + ("  <- wrong" if row.wrong else "") for row in self.rows]
        lines.append(f"{'output of the model':<{width}}  {'':>35}  {_cells(self.output, 20)}")
        first = self.first_wrong
        lines.append(f"no layer goes wrong by itself (all are above {self.threshold_db:g} dB)" if first is None else
                     f"first layer that goes wrong: {first.name}: {first.wrong}")
        if self.never_called:
            lines.append(f"{len(self.never_called)} quantized layers were not reached by these inputs, the first is "
                         f"{self.never_called[0]}")
        return "\n".join(lines)


def compare(reference: nn.Module, model: nn.Module, inputs: Any, *, threshold_db: float = 10.0) -> Comparison:
    """Error of each quantized layer of `model` against the float `reference`, on `inputs`.

    inputs        what one call takes: a tensor, a tuple of positional or a mapping of keyword arguments
    threshold_db  a layer goes wrong if its local SQNR is below this (10 dB is an error of 32 % of the output; int4
                  weights give about 20, int8 about 40), or if it makes NaN or Inf where the reference has none

    Either model may be compiled: its eager form is run. Neither is changed; hooks are taken off again, also after an
    error. Experts get a row a projection, over all that were chosen, and one for the layer, where also the routing
    counts. The reference's outputs of all quantized layers are held at once, so keep the inputs short.
    Raises EvaluationError if nothing in `model` is quantized or `reference` lacks a layer of it.
    """
    reference, model = getattr(reference, "_orig_mod", reference), getattr(model, "_orig_mod", model)
    if reference is model:
        raise EvaluationError("reference and model are one object; quantize works in place, so keep the float model "
                              "with copy.deepcopy(model) before it")
    pairs, experts = pair_layers(reference, model), pair_experts(reference, model)
    if not pairs and not experts:
        raise EvaluationError(f"nothing in this {type(model).__name__} is quantized by qpass; the order is "
                              "compare(reference, model, inputs)")
    specs = {name: str(packed.spec) for name, (packed, _) in pairs.items()}
    for name, pair in experts.items():
        specs |= row_specs(name, pair.packed)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        with ExitStack() as hooks:
            kept, calls = observe_reference(reference, pairs, hooks), keep_experts(experts, hooks)
            wanted = _run(reference, inputs)
        with ExitStack() as hooks:
            meters = {name: _Meter(spec) for name, spec in specs.items()}
            order = observe_model(pairs, meters, kept, hooks)
            observe_experts(experts, meters, calls, order, hooks)
            got = _run(model, inputs)
        rows = tuple(meters[name].row(name, threshold_db) for name in order)
        output = _Sums()
        output.add(got, wanted)
    return Comparison(rows=rows, output=output.error(), threshold_db=threshold_db,
                      never_called=tuple(name for name in specs if name not in order))


class _Sums:
    """Running sums from which a LayerError is made, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = self.max_abs = 0.0
        self.nonfinite = 0

    def add(self, got: Tensor, want: Tensor) -> None:
        got, want = got.detach().float(), want.detach().float().to(got.device)
        if got.shape != want.shape:
            raise EvaluationError(f"one layer gave {tuple(got.shape)} and its reference {tuple(want.shape)}; are these "
                                  "two the same model?")
        self.nonfinite += int((~torch.isfinite(got) & torch.isfinite(want)).sum())
        both = torch.isfinite(got) & torch.isfinite(want)
        got, want = got.where(both, 0), want.where(both, 0)
        difference = got - want
        self.signal += float(want.square().sum(dtype=torch.float64))
        self.noise += float(difference.square().sum(dtype=torch.float64))
        if difference.numel():
            self.max_abs = max(self.max_abs, float(difference.abs().max()))

    def error(self) -> LayerError:
        if self.nonfinite:
            return LayerError(sqnr_db=-math.inf, max_abs=math.inf, relative=math.inf, nonfinite=self.nonfinite)
        if self.noise == 0:
            return LayerError(sqnr_db=math.inf, max_abs=0.0, relative=0.0)
        if self.signal == 0:
            return LayerError(sqnr_db=-math.inf, max_abs=self.max_abs, relative=math.inf)
        return LayerError(sqnr_db=10 * math.log10(self.signal / self.noise), max_abs=self.max_abs,
                          relative=math.sqrt(self.noise / self.signal))


class _Meter:
    """The two errors of one layer, over all of its calls."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.local, self.accumulated, self.calls = _Sums(), _Sums(), 0

    def add(self, got: Tensor, local: Tensor, accumulated: Tensor) -> None:
        self.local.add(got, local)
        self.accumulated.add(got, accumulated)
        self.calls += 1

    def row(self, name: str, threshold_db: float) -> ComparisonRow:
        local = self.local.error()
        wrong = ""
        if local.nonfinite:
            wrong = f"{local.nonfinite} NaN or Inf where the reference has none"
        elif local.sqnr_db < threshold_db:
            wrong = f"its own error is {local.relative:.0%} of its output ({local.sqnr_db:.1f} dB)"
        return ComparisonRow(name=name, spec=self.spec, calls=self.calls, local=local, wrong=wrong,
                             accumulated=self.accumulated.error())


def _cells(error: LayerError, width: int) -> str:
    return f"{error.sqnr_db:>{width}.1f} {error.max_abs:>10.3g} {error.relative:>9.2%}"


def _run(model: nn.Module, inputs: Any) -> Tensor:
    """The model's main output for `inputs`, which are moved to its device."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    else:
        given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        output = model(*[v.to(device) if isinstance(v, Tensor) else v for v in given])
    while not isinstance(output, Tensor):
        if hasattr(output, "logits"):
            output = output.logits
        elif isinstance(output, Mapping) and output:
            output = next(iter(output.values()))
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            raise EvaluationError(f"{type(model).__name__} gave {type(output).__name__}, in which there is no tensor "
                                  "to compare")
    return output
