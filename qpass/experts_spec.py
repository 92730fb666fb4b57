"""ExpertsSpec: all that a kernel must know of one layer of experts, as data and as the string that a graph carries.

`experts 32x768 of 2048 silu*up | w4a8 int4:g64:sym x int8:token:sym 1536x2048 @linear_w4a8_avx2 | w4a8 ... 2048x768
@linear_w4a8_avx2 @experts_loop`: number of experts, sizes, what stands between the two products, the two weights that
every expert has, and the kernel. Like a LinearSpec it names no layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from qpass.spec import LinearSpec

GateFunction = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity"]
GATE_FUNCTIONS: tuple[GateFunction, ...] = get_args(GateFunction)
_NUMBER = r"[-+.\w]+"
_GATE = re.compile(rf"(?P<function>\w+?)(?:\((?P<inner>(?:\w+={_NUMBER},?)+)\))?"
                   rf"(?P<gated>\*up(?:\((?P<outer>(?:\w+={_NUMBER},?)+)\))?)?")
_SPEC = re.compile(r"experts (?P<experts>\d+)x(?P<intermediate>\d+) of (?P<hidden>\d+) (?P<gate>\S+)"
                   r" \| (?P<up>[^|]+) \| (?P<down>[^|]+) @(?P<kernel>\S+)")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What an expert computes between its two products, on float32 numbers.

    gated      y holds two halves, g = y[:I] and u = y[I:], and
               h = f(min(g, limit)) * (clamp(u, -up_limit, up_limit) + shift)
    not gated  h = f(min(y, limit))
    with f the function: silu is g * sigmoid(alpha * g), relu2 is relu(g)^2, gelu the exact one with erf, gelu_tanh its
    usual approximation. Rows are packed gate first, then up, however the model stores them.
    """

    function: GateFunction
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    up_limit: float | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.function not in GATE_FUNCTIONS:
            raise ValueError(f"gate function must be one of {', '.join(GATE_FUNCTIONS)}, got {self.function!r}")
        if self.alpha != 1.0 and self.function != "silu":
            raise ValueError(f"alpha belongs to silu, got {self.function!r} with alpha={self.alpha}")
        if not self.gated and (self.up_limit is not None or self.shift):
            raise ValueError("up_limit and shift belong to gated experts")

    @property
    def keeps_zero(self) -> bool:
        """Whether it gives 0 for y = 0, so that an expert without biases maps 0 to 0."""
        return self.function != "sigmoid" or (self.gated and self.shift == 0)

    def __str__(self) -> str:
        inner = _options({"alpha": self.alpha if self.alpha != 1.0 else None, "limit": self.limit})
        if not self.gated:
            return self.function + inner
        return f"{self.function}{inner}*up" + _options({"limit": self.up_limit, "shift": self.shift or None})

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Gate:
        """The inverse of str(); raises ValueError on anything else."""
        m = _GATE.fullmatch(text)
        if m is None or m["function"] not in GATE_FUNCTIONS:
            raise ValueError(f"not what stands between an expert's products: {text!r}")
        inner, outer = _read_options(m["inner"]), _read_options(m["outer"])
        return Gate(function=m["function"], gated=m["gated"] is not None,
                    alpha=inner.get("alpha", 1.0), limit=inner.get("limit"), up_limit=outer.get("limit"),
                    shift=outer.get("shift", 0.0))


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """y[t] = sum over j of weight[t, j] * down_e(gate(up_e(x[t]))) with e = index[t, j].

    Invariants: `up` is [2 * intermediate, hidden] per expert if the gate is gated, else [intermediate, hidden];
    `down` is [hidden, intermediate]; both are LinearSpecs whose `kernel` is the linear kernel in whose layout each
    expert's block is packed. Either may be None: that weight stays in float. `kernel` computes the whole.
    """

    experts: int
    hidden: int
    intermediate: int
    gate: Gate
    up: LinearSpec | None
    down: LinearSpec | None
    kernel: str = "experts_reference"

    def __post_init__(self) -> None:
        wanted = {"up": (self.up_features, self.hidden), "down": (self.hidden, self.intermediate)}
        for name, spec in (("up", self.up), ("down", self.down)):
            if spec is not None and (spec.out_features, spec.in_features) != wanted[name]:
                raise ValueError(f"{name} must be {wanted[name]}, got {(spec.out_features, spec.in_features)}")

    @property
    def up_features(self) -> int:
        """Rows of the first weight of each expert."""
        return self.intermediate * (2 if self.gate.gated else 1)

    @property
    def parts(self) -> tuple[LinearSpec | None, LinearSpec | None]:
        """up, down."""
        return self.up, self.down

    @property
    def family(self) -> str:
        """`w4a8` if both weights are of this family, otherwise `mixed`."""
        families = {"float" if part is None else part.family for part in self.parts}
        return families.pop() if len(families) == 1 else "mixed"

    def on(self, kernel: str, up: str | None = None, down: str | None = None) -> ExpertsSpec:
        """The same experts on another kernel, each part packed for the linear kernel named."""
        return replace(self, kernel=kernel,
                       up=self.up.on(up) if self.up is not None and up is not None else self.up,
                       down=self.down.on(down) if self.down is not None and down is not None else self.down)

    def holding(self, experts: int) -> ExpertsSpec:
        """The spec of a slice of the experts."""
        return replace(self, experts=experts)

    def __str__(self) -> str:
        up, down = ("float" if part is None else str(part) for part in self.parts)
        return (f"experts {self.experts}x{self.intermediate} of {self.hidden} {self.gate} | {up} | {down} "
                f"@{self.kernel}")

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> ExpertsSpec:
        """The inverse of str(); raises ValueError on anything else."""
        m = _SPEC.fullmatch(text)
        if m is None:
            raise ValueError(f"not a spec of experts: {text!r}")
        up, down = (None if part == "float" else LinearSpec.parse(part) for part in (m["up"], m["down"]))
        return ExpertsSpec(experts=int(m["experts"]), hidden=int(m["hidden"]), intermediate=int(m["intermediate"]),
                           gate=Gate.parse(m["gate"]), up=up, down=down, kernel=m["kernel"])


def _options(values: Mapping[str, float | None]) -> str:
    given = ",".join(f"{name}={value!r}" for name, value in values.items() if value is not None)
    return f"({given})" if given else ""


def _read_options(text: str | None) -> dict[str, float]:
    return {name: float(value) for name, _, value in (part.partition("=") for part in (text or "").split(",") if part)}
