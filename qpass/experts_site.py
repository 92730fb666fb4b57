"""ExpertsSite: how one module computes its experts, as the graph was understood: parameters, gate and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qpass.experts_spec import Gate

Rows = Literal["one after the other", "alternating", "apart", "single"]
Form = Literal["indexed", "scored", "sorted"]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """Where the module's forward takes a tensor: by position, or by name where it is given as a keyword."""

    position: int
    name: str


@dataclass(frozen=True, kw_only=True)
class ExpertsSite:
    """Facts of one module of E experts, shared by the sites of its parameters. Names are leaves, relative to `owner`.

    first       the first weight: one parameter, or two where gate and up are stored apart (gate, then up)
    rows        how its gate and up rows lie: halves "one after the other", "alternating", "apart" in two parameters,
                or "single" where there is no gate
    up_first    in both halves and alternation, whether up comes before gate
    second      the second weight
    transposed  for each of first and second, whether it is stored [E, K, N]
    biases      parameters [E, N] added to the first weight's result (gate, then up, if apart) and [E, H]; or None
    form        "indexed": forward(x [T, H], index [T, k], weight [T, k]);
                "scored": forward(x [T, H], weight [T, E]), zero for experts not chosen;
                "sorted": forward(x [E * T, H]), the rows of expert 0 first, then those of expert 1, unweighted
    """

    owner: str
    experts: int
    hidden: int
    intermediate: int
    gate: Gate
    first: tuple[str, ...]
    second: str
    rows: Rows
    up_first: bool = False
    transposed: tuple[bool, bool] = (False, False)
    first_bias: tuple[str, ...] | None = None
    second_bias: str | None = None
    form: Form
    x: Argument
    index: Argument | None = None
    weight: Argument | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Leaves of the parameters that are multiplied."""
        return (*self.first, self.second)

    def is_first(self, leaf: str) -> bool:
        """Whether this parameter is part of the first weight."""
        return leaf in self.first
