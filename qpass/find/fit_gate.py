"""Fit gate: numbers that went into the part between an expert's two products and came out; the Gate that gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, fx

from qpass.experts_site import Rows
from qpass.experts_spec import GATE_FUNCTIONS, Gate
from qpass.kernels.reference.experts import apply_gate

_ENOUGH = 1 << 14  # numbers compared


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A gate, and how its two inputs lie in the first product's result; `up_first` as in ExpertsSite."""

    gate: Gate
    rows: Rows
    up_first: bool


def fit_gate(before: Sequence[Tensor], after: Tensor, constants: Sequence[float]) -> Fit | None:
    """The first Fit, simple ones before others, with which `before` gives `after` to eleven digits; None if none does.

    before     results of the first product: one tensor [R, 2I] or [R, I], or two [R, I]
    after      input of the second product, [R, I]
    constants  numbers that the code uses, candidates for limits, slopes and shifts
    """
    if any(tensor.shape[0] != after.shape[0] for tensor in before):
        return None
    count = max(1, min(after.shape[0], _ENOUGH // max(after.shape[1], 1)))
    rows = torch.linspace(0, after.shape[0] - 1, count).long()
    wanted, size = after[rows], after.shape[1]
    for fit, pair in _arranged([tensor[rows] for tensor in before], size):
        for gate in _gates(fit.gate.gated, constants):
            if torch.allclose(apply_gate(pair, gate), wanted, rtol=1e-11, atol=1e-11):
                return Fit(gate=gate, rows=fit.rows, up_first=fit.up_first)
    return None


def constants_in(nodes: Sequence[fx.Node]) -> tuple[float, ...]:
    """The numbers, without sign, that elementwise calls of `nodes` have among their arguments."""
    found: dict[float, None] = {}
    for node in nodes:
        if any(word in str(node.target) for word in ("clamp", "mul", "add", "div", "sub", "minimum", "maximum", "silu",
                                                     "swish", "pow", "hardtanh")):
            for value in (*node.args, *node.kwargs.values()):
                if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                    found[abs(float(value))] = None
    return tuple(found)


def _arranged(before: Sequence[Tensor], size: int) -> Iterator[tuple[Fit, Tensor]]:
    """Every way in which gate and up can lie, with them put gate first."""
    gated, plain = Gate(function="silu"), Gate(function="silu", gated=False)
    if len(before) == 2:
        for up_first in (False, True):
            pair = list(before[::-1] if up_first else before)
            yield Fit(gate=gated, rows="apart", up_first=up_first), torch.cat(pair, -1)
    elif before[0].shape[1] == size:
        yield Fit(gate=plain, rows="single", up_first=False), before[0]
    elif before[0].shape[1] == 2 * size:
        halves, pairs = before[0].chunk(2, -1), (before[0][:, ::2], before[0][:, 1::2])
        for up_first in (False, True):
            yield (Fit(gate=gated, rows="one after the other", up_first=up_first),
                   torch.cat(halves[::-1] if up_first else halves, -1))
        for up_first in (False, True):
            yield (Fit(gate=gated, rows="alternating", up_first=up_first),
                   torch.cat(pairs[::-1] if up_first else pairs, -1))


def _gates(gated: bool, constants: Sequence[float]) -> Iterator[Gate]:
    maybe = (None, *constants)
    shifts = (0.0, *constants, *(-c for c in constants)) if gated else (0.0,)
    choices = list(product(maybe, maybe if gated else (None,), shifts, maybe))
    choices.sort(key=lambda choice: sum(value not in (None, 0.0) for value in choice))
    for limit, up_limit, shift, alpha in choices:
        for function in ("silu",) if alpha is not None else GATE_FUNCTIONS:
            yield Gate(function=function, gated=gated, alpha=alpha or 1.0, limit=limit, up_limit=up_limit, shift=shift)
