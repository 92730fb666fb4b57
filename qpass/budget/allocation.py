"""Search allocation: choices a group, each with a cost and a size, and a limit in; the cheapest choices within it out.

A multiple-choice knapsack, solved by HiGHS through scipy.optimize.milp (`pip install scipy`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qpass.errors import RecipeError

_BUDGET = re.compile(r"\s*(?P<number>\d+(\.\d*)?)\s*(?P<unit>[a-zA-Z /]*?)\s*$")
_BYTES = {"": 1, "b": 1, "byte": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20,
          "gib": 2**30}
_RATES = ("tokens per second", "tokens/s", "token/s", "tok/s", "tps")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit: `kind` is "bits" (of a weight on average), "bytes" (of all searched weights) or "rate" (tokens/s)."""

    kind: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way for a group of sites. `scheme` None is float; cost in nats a token, size in what the budget limits."""

    scheme: str | None
    cost: float
    size: float


def read_budget(value: str | int | float) -> Budget:
    """A Budget from "4.5 bits", bytes (120000000, "120 MB") or "30 tokens per second"; RecipeError otherwise."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = f"{value} bytes"
    found = _BUDGET.match(value) if isinstance(value, str) else None
    if found is not None and float(found["number"]) > 0:
        number, unit = float(found["number"]), found["unit"].lower()
        if unit in ("bits", "bit", "bits per weight"):
            return Budget(kind="bits", value=number)
        if unit in _RATES:
            return Budget(kind="rate", value=number)
        if unit in _BYTES:
            return Budget(kind="bytes", value=number * _BYTES[unit])
    raise RecipeError(f"not a budget: {value!r}; give '4.5 bits' (a weight, on average), bytes (120000000 or '120 MB') "
                      "or '30 tokens per second'")


def allocate(groups: Sequence[Sequence[Choice]], limit: float) -> list[Choice]:
    """One choice a group: the smallest sum of costs whose sizes add up to at most `limit`.

    Raises RecipeError if the smallest choices are too large, or if scipy is missing.
    """
    try:
        import numpy as np
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise RecipeError("search solves its allocation with scipy, which is not installed: pip install scipy"
                          ) from error
    least = sum(min(choice.size for choice in group) for group in groups)
    if least > limit:
        raise RecipeError(f"the budget of {limit:.6g} is below {least:.6g}, what the smallest of the schemes take; "
                          "raise it, or allow smaller schemes")
    flat = [(index, choice) for index, group in enumerate(groups) for choice in group]
    rows = csr_array((np.ones(len(flat)), ([index for index, _ in flat], range(len(flat)))),
                     shape=(len(groups), len(flat)))
    cost = np.array([choice.cost for _, choice in flat])
    size = np.array([choice.size for _, choice in flat])
    scale_cost, scale_size = max(float(cost.max()), 1e-30), max(float(size.max()), 1e-30)
    solved = milp(cost / scale_cost, integrality=np.ones(len(flat)), bounds=(0, 1),
                  constraints=[LinearConstraint(rows, 1, 1),
                               LinearConstraint(size[None] / scale_size, -np.inf, limit / scale_size)],
                  options={"mip_rel_gap": 1e-4, "time_limit": 60})
    if solved.x is None:
        raise RecipeError(f"the allocation could not be solved: {solved.message}")
    picked = [choice for (_, choice), taken in zip(flat, solved.x, strict=True) if taken > 0.5]
    return picked
