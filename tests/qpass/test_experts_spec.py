"""ExpertsSpec: what a graph carries of a layer of experts reads back as it was."""

from __future__ import annotations

import pytest

from qpass.experts_spec import GATE_FUNCTIONS, ExpertsSpec, Gate
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec

UP = LinearSpec(family="w4a8", weight=WeightArgs(bits=4, granularity="per_group", group_size=64),
                activation=ActivationArgs(), out_features=256, in_features=64, kernel="linear_w4a8_avx2")
DOWN = LinearSpec(family="w8a16", weight=WeightArgs(bits=8), activation=None, out_features=64, in_features=128)


@pytest.mark.parametrize("gate", [
    *(Gate(function=name) for name in GATE_FUNCTIONS), Gate(function="relu2", gated=False),
    Gate(function="silu", alpha=1.702, limit=7.0, up_limit=7.0, shift=1.0), Gate(function="silu", limit=1e-05),
    Gate(function="gelu", up_limit=2.5), Gate(function="silu", gated=False, alpha=1.702)], ids=str)
def test_gates_read_back(gate: Gate) -> None:
    assert Gate.parse(str(gate)) == gate


def test_specs_read_back() -> None:
    spec = ExpertsSpec(experts=8, hidden=64, intermediate=128, gate=Gate(function="silu"), up=UP, down=DOWN)
    assert str(spec) == ("experts 8x128 of 64 silu*up | w4a8 int4:g64:sym x int8:token:sym 256x64 @linear_w4a8_avx2 "
                         "| w8a16 int8:channel:sym 64x128 @linear_reference @experts_reference")
    assert ExpertsSpec.parse(str(spec)) == spec
    assert spec.family == "mixed" and spec.up_features == 256
    on = spec.on("experts_loop", "a", "b")
    assert [p.kernel for p in on.parts if p] == ["a", "b"] and on.kernel == "experts_loop"
    assert spec.holding(2).experts == 2


@pytest.mark.parametrize("text", ["", "silu*down", "wild*up", "silu(alpha)*up"])
def test_other_text_is_no_gate(text: str) -> None:
    with pytest.raises(ValueError, match="not what stands between"):
        Gate.parse(text)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="not a spec of experts"):
        ExpertsSpec.parse("w4a8 int4:g64:sym 2x64 @linear_reference")
    with pytest.raises(ValueError, match=r"down must be \(64, 128\), got \(64, 64\)"):
        ExpertsSpec(experts=8, hidden=64, intermediate=128, gate=Gate(function="silu"), up=UP,
                    down=LinearSpec(family="w8a16", weight=WeightArgs(bits=8), activation=None, out_features=64,
                                    in_features=64))
    with pytest.raises(ValueError, match="alpha belongs to silu"):
        Gate(function="relu", alpha=2.0)
    with pytest.raises(ValueError, match="belong to gated"):
        Gate(function="relu", gated=False, shift=1.0)
    with pytest.raises(ValueError, match="must be one of silu"):
        Gate(function="step")  # type: ignore[arg-type]


def test_zero_stays_zero_unless_the_function_says_otherwise() -> None:
    assert Gate(function="sigmoid").keeps_zero and Gate(function="relu2", gated=False).keeps_zero
    assert not Gate(function="sigmoid", gated=False).keeps_zero
    assert not Gate(function="sigmoid", shift=1.0).keeps_zero
