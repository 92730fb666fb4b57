"""LinearSpec: all that a kernel must know of one quantized linear, as data and as the string a graph carries.

The string stands in graphs as an op argument, so that a dump says what is computed and the compiler sees a constant:
`w4a8 int4:g64:sym x int8:token:sym 576x1536 @linear_w4a8_avx2`. It holds no layer name: two layers of one shape and
scheme share one compiled graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qpass.scheme import ActivationArgs, WeightArgs, activation_words, family_of

_PATTERN = re.compile(
    r"(?P<family>\S+) (?P<type>\w+?)(?P<bits>\d):(?P<group>[gb]\d+|channel|tensor):(?P<sym>sym|asym)"
    r"(?::(?P<scales>integer))?"
    r"(?: x (?P<xtype>int|fp)(?P<xbits>\d):(?P<xgroup>g\d+|token|tensor):(?P<xsym>sym|asym)"
    r"(?::(?P<when>static|local))?(?::(?P<exact>exact))?)? (?P<n>\d+)x(?P<k>\d+) @(?P<kernel>\S+)"
)


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """y[..., N] = x[..., K] @ dequantize(weight)[N, K].T + bias, the activation rounded first if `activation` is set.

    Invariants: 1 <= group_size; group_size == in_features unless granularity is per_group; per_group needs
    in_features % group_size == 0 (the planner adjusts, skips or refuses before a spec is made).
    `kernel` is the registered kernel whose layout the packed tensors have. `exact`: where no kernel multiplies what the
    activation is rounded to, its rounded values are multiplied in float32.
    """

    family: str
    weight: WeightArgs
    activation: ActivationArgs | None
    out_features: int
    in_features: int
    kernel: str = "linear_reference"
    exact: bool = False

    @property
    def group_size(self) -> int:
        """Weights that share a scale along K; the whole row when the granularity is not per_group."""
        return self.weight.group_size or max(self.in_features, 1)

    @property
    def groups(self) -> int:
        """Scales per row."""
        return max(1, -(-self.in_features // self.group_size))

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.out_features, self.in_features

    def weight_only(self) -> LinearSpec:
        """The same product with the activation left in its own dtype."""
        return replace(self, activation=None, family=family_of(self.weight, None), exact=False)

    def on(self, kernel: str) -> LinearSpec:
        """The same product on another kernel."""
        return replace(self, kernel=kernel)

    def __str__(self) -> str:
        w, a = self.weight, self.activation
        text = f"{self.family} {w.type}{w.bits}:{w.grouping}:{'sym' if w.symmetric else 'asym'}"
        text += "" if w.scales == "amax" else f":{w.scales}"
        if a is not None:
            shared = f"g{a.group_size}" if a.group_size else a.granularity.removeprefix("per_")
            when = ":static" if a.static else ":local" if a.dynamic == "local" else ""
            text += f" x {a.number}:{shared}:{'sym' if a.symmetric else 'asym'}{when}"
            text += ":exact" if self.exact else ""
        return f"{text} {self.out_features}x{self.in_features} @{self.kernel}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> LinearSpec:
        """The inverse of str(); raises ValueError on anything else."""
        m = _PATTERN.fullmatch(text)
        if m is None:
            raise ValueError(f"not a linear spec: {text!r}")
        group = m["group"]
        size = int(group[1:]) if group[1:].isdigit() else None
        granularity = {"g": "per_group", "b": "per_block"}[group[0]] if size else f"per_{group}"
        weight = WeightArgs(bits=int(m["bits"]), type=m["type"], group_size=size, symmetric=m["sym"] == "sym",
                            granularity=granularity,  # type: ignore[arg-type]
                            scales=m["scales"] or "amax")  # type: ignore[arg-type]
        activation = _activation(m) if m["xtype"] else None
        return LinearSpec(family=m["family"], weight=weight, activation=activation, out_features=int(m["n"]),
                          in_features=int(m["k"]), kernel=m["kernel"], exact=bool(m["exact"]))


def effective_text(spec: LinearSpec) -> str:
    """What really runs, in a few words: `w4a8 g64`, `w8a8 channel`, `w4a16 g128 asym`, `w4a8 channel, x asym`,
    `w4a8 g64 integer scales`."""
    w, a = spec.weight, spec.activation
    group = f"g{w.group_size}" if w.group_size else w.granularity.removeprefix("per_")
    asym = ("" if w.symmetric else " asym") + ("" if w.scales == "amax" else f" {w.scales} scales")
    words = () if a is None else activation_words(a)
    return f"{spec.family} {group}{asym}" + (f", x {' '.join(words)}" if words else "")


def _activation(m: re.Match[str]) -> ActivationArgs:
    group = m["xgroup"]
    when: dict[str | None, Any] = {None: True, "static": False, "local": "local"}
    size = int(group[1:]) if group.startswith("g") else None
    return ActivationArgs(bits=int(m["xbits"]), type="int" if m["xtype"] == "int" else "float", group_size=size,
                          granularity="per_group" if size else f"per_{group}",  # type: ignore[arg-type]
                          symmetric=m["xsym"] == "sym", dynamic=when[m["when"]])
