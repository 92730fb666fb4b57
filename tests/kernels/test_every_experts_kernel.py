"""Every kernel of experts that runs here agrees with float64, expert by expert and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qpass.kernels.dispatch  # noqa: F401
from qpass.experts_spec import ExpertsSpec, Gate
from qpass.kernels.experts_choice import choose_experts, pack_blocks, unpack_block
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.kernels.reference.experts import apply_gate
from qpass.kernels.registry import KERNELS, ExpertsCall, Kernel, force_kernel, kernel, load_builtin
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight, quantize_weight

load_builtin()
GATES = {
    "silu": Gate(function="silu"), "gelu": Gate(function="gelu"), "gelu_tanh": Gate(function="gelu_tanh"),
    "clamped": Gate(function="silu", alpha=1.702, limit=0.7, up_limit=0.5, shift=1.0), "relu": Gate(function="relu"),
    "relu2": Gate(function="relu2", gated=False), "silu-alone": Gate(function="silu", gated=False),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CPU = torch.device("cpu")


def part(family: str, n: int, k: int, group: int | None = 32, *, asym: bool = False, asym_x: bool = False
         ) -> LinearSpec:
    weight = WeightArgs(bits=int(family[1]), granularity="per_group" if group else "per_channel", group_size=group,
                        symmetric=not asym)
    activation = ActivationArgs(symmetric=not asym_x) if family.endswith("a8") else None
    return LinearSpec(family=family, weight=weight, activation=activation, out_features=n, in_features=k)


def spec_of(family: str, gate: Gate, *, experts: int = 5, hidden: int = 64, intermediate: int = 96,
            **numbers: Any) -> ExpertsSpec:
    rows = intermediate * (2 if gate.gated else 1)
    return ExpertsSpec(experts=experts, hidden=hidden, intermediate=intermediate, gate=gate,
                       up=part(family, rows, hidden, **numbers), down=part(family, hidden, intermediate, **numbers))


class Made:
    """Random experts packed for one kernel, and the same in float64."""

    def __init__(self, chosen: Kernel, spec: ExpertsSpec, dtype: torch.dtype, *, biases: bool = False) -> None:
        call = ExpertsCall(spec=spec, device=CPU, dtype=dtype, bias=biases)
        why = chosen.why_not(call)
        if why is None and chosen.prepare is not None:
            why = chosen.prepare()
        if why is not None:
            pytest.skip(why)
        with force_kernel(chosen.name):
            self.spec, _ = choose_experts(call, prepare=True)
        self.dtype, self.packed = dtype, []
        self.weights: list[list[CanonicalWeight]] = []
        draw = torch.Generator().manual_seed(7)
        for one in self.spec.parts:
            assert one is not None
            weights = [quantize_weight((torch.randn(one.out_features, one.in_features, generator=draw) / 8 + 0.01)
                                       .to(dtype), one) for _ in range(spec.experts)]
            blocks = pack_blocks(weights, one, spec.experts)
            self.packed += [blocks[name] for name in kernel(one.kernel).layout.names(one)]
            self.weights.append(weights)
        sizes = (spec.up_features, spec.hidden)
        self.bias = [torch.randn(spec.experts, n, generator=draw).to(dtype) if biases else None for n in sizes]

    def run(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.qpass.experts(x, index, weight, self.packed, self.bias, str(self.spec))

    def exact(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The definition in float64, one token and one place at a time."""
        y = torch.zeros(x.shape[0], self.spec.hidden, dtype=torch.float64)
        for t in range(x.shape[0]):
            for j in range(index.shape[1]):
                e = int(index[t, j])
                if 0 <= e < self.spec.experts:
                    h = apply_gate(self._product(x[t, None], e, 0), self.spec.gate)
                    y[t] += weight[t, j].double() * self._product(h.float(), e, 1)[0]
        return y

    def _product(self, x: Tensor, expert: int, which: int) -> Tensor:
        one = self.spec.parts[which]
        assert one is not None
        real = x.double()
        if one.activation is not None and one.activation.symmetric:
            codes, scale = quantize_symmetric(x)
            real = codes.double() * scale.double()
        elif one.activation is not None:
            codes, scale, zero_point = quantize_asymmetric(x)
            real = (codes.double() - zero_point.double()) * scale.double()
        y = real @ dequantize_weight(self.weights[which][expert], one, torch.float64).t()
        bias = self.bias[which]
        return y if bias is None else y + bias[expert].double()


def routing(tokens: int, places: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=draw)[:places] for _ in range(tokens)]) \
        if tokens else torch.zeros(0, places, dtype=torch.long)
    return index, torch.rand(tokens, places, generator=draw) + 0.1


def activation(tokens: int, hidden: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return (torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)) * 2 + 0.2).to(dtype)


def assert_close(made: Made, got: Tensor, want: Tensor) -> None:
    assert got.dtype == made.dtype and got.shape == want.shape
    # A code of the second quantization may differ by one where exp is computed another way; x in 16 bits may be
    # multiplied as such.
    rounding = 4e-3 if made.spec.family.endswith("a8") else 2e-2 if made.spec.kernel != "experts_reference" else 1e-4
    allowed = EPS[made.dtype] * want.abs() + rounding * want.abs().amax().clamp_min(1e-6) if want.numel() else want
    assert bool(((got.double() - want).abs() <= allowed).all()), float((got.double() - want).abs().max())


EXPERTS = [k for k in list(KERNELS.values()) if k.op == "experts" and k.device in ("*", "cpu")]
CASES = [pytest.param(k, family, id=f"{k.name}-{family}" if k.scheme == "*" else k.name) for k in EXPERTS
         for family in (("w4a8", "w8a8", "w4a16", "w8a16") if k.scheme == "*" else (k.scheme,))]
every_kernel = pytest.mark.parametrize(("chosen", "family"), CASES)


@every_kernel
@pytest.mark.parametrize("gate", list(GATES.values()), ids=list(GATES))
def test_equals_float64(chosen: Kernel, family: str, gate: Gate) -> None:
    made = Made(chosen, spec_of(family, gate), torch.float32, biases=gate.shift != 0)
    index, weight = routing(7, 3, 5)
    x = activation(7, 64, torch.float32)
    assert_close(made, made.run(x, index, weight), made.exact(x, index, weight))


@every_kernel
@pytest.mark.parametrize(("name", "numbers"), [
    ("bf16", {}), ("fp16", {"asym": True}), ("bf16", {"asym_x": True}), ("fp32", {"group": None}), ("fp16", {}),
    ("fp32", {"asym": True, "asym_x": True})], ids=["bf16", "asym", "x-asym", "channel", "fp16", "both-asym"])
def test_dtypes_and_granularities(chosen: Kernel, family: str, name: str, numbers: dict[str, Any]) -> None:
    dtype = DTYPES[name]
    made = Made(chosen, spec_of(family, GATES["silu"], **numbers), dtype, biases=True)
    index, weight = routing(5, 2, 5)
    x = activation(5, 64, dtype)
    assert_close(made, made.run(x, index, weight.to(dtype)), made.exact(x, index, weight.to(dtype)))


@every_kernel
@pytest.mark.parametrize(("tokens", "places"), [(1, 1), (1, 5), (2, 2), (40, 1), (33, 5), (0, 2)],
                         ids=["one", "one-to-all", "two", "top1", "all", "none"])
def test_tokens_and_top_k(chosen: Kernel, family: str, tokens: int, places: int) -> None:
    made = Made(chosen, spec_of(family, GATES["silu"], hidden=96, intermediate=32), torch.float32)
    index, weight = routing(tokens, places, 5)
    x = activation(tokens, 96, torch.float32)
    assert_close(made, made.run(x, index, weight), made.exact(x, index, weight))


@every_kernel
def test_odd_sizes(chosen: Kernel, family: str) -> None:
    made = Made(chosen, spec_of(family, GATES["silu"], experts=3, hidden=77, intermediate=41, group=None),
                torch.float32)
    index, weight = routing(9, 2, 3)
    x = activation(9, 77, torch.float32)
    assert_close(made, made.run(x, index, weight), made.exact(x, index, weight))


@every_kernel
def test_uneven_routing(chosen: Kernel, family: str) -> None:
    """One expert for every token, experts that nobody chose, one expert twice for a token."""
    made = Made(chosen, spec_of(family, GATES["silu"]), torch.float32)
    x = activation(6, 64, torch.float32)
    for index in (torch.full((6, 1), 3), torch.tensor([[0, 4]] * 6), torch.tensor([[2, 2]] * 6)):
        weight = torch.rand(index.shape)
        assert_close(made, made.run(x, index, weight), made.exact(x, index, weight))


@every_kernel
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_sentinels_add_nothing(chosen: Kernel, family: str, index_dtype: torch.dtype) -> None:
    made = Made(chosen, spec_of(family, GATES["silu"]), torch.float32)
    x = activation(4, 64, torch.float32)
    index = torch.tensor([[0, 5], [5, 5], [5, 2], [-1, 4]], dtype=index_dtype)
    weight = torch.rand(4, 2)
    weight[1] = float("nan")
    got = made.run(x, index, weight)
    assert_close(made, got, made.exact(x, index, weight.nan_to_num(0)))
    assert not got[1].any()


@every_kernel
def test_a_row_does_not_depend_on_the_others(chosen: Kernel, family: str) -> None:
    made = Made(chosen, spec_of(family, GATES["silu"]), torch.float32)
    index, weight = routing(19, 2, 5)
    x = activation(19, 64, torch.float32)
    whole = made.run(x, index, weight)
    exact = family.endswith("a8") or chosen.name != "experts_reference"  # else torch's float product decides
    for t in (0, 7, 18):
        alone = made.run(x[t, None], index[t, None], weight[t, None])[0]
        assert torch.equal(whole[t], alone) if exact else torch.allclose(whole[t], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole, made.run(x, index, weight))


@every_kernel
def test_a_slice_of_experts_is_a_view(chosen: Kernel, family: str) -> None:
    made = Made(chosen, spec_of(family, GATES["silu"]), torch.float32)
    index, weight = routing(6, 2, 5)
    x = activation(6, 64, torch.float32)
    part_of = [t[2:4] for t in made.packed]
    assert all(a.data_ptr() == b[2].data_ptr() for a, b in zip(part_of, made.packed, strict=True))
    local = torch.where((index >= 2) & (index < 4), index - 2, 2)
    got = torch.ops.qpass.experts(x, local, weight, part_of, made.bias, str(made.spec.holding(2)))
    want = made.exact(x, torch.where(local < 2, index, 5), weight)
    assert_close(made, got, want)


@every_kernel
def test_takes_an_activation_that_is_integers(chosen: Kernel, family: str) -> None:
    if not family.endswith("a8"):
        pytest.skip("this family multiplies float activations")
    for asym in (False, True):
        made = Made(chosen, spec_of(family, GATES["silu"], asym_x=asym), torch.bfloat16)
        index, weight = routing(5, 2, 5)
        x = activation(5, 64, torch.bfloat16)
        codes = quantize_asymmetric(x) if asym else (*quantize_symmetric(x), None)
        got = torch.ops.qpass.experts_q(*codes, index, weight, made.packed, made.bias, str(made.spec), x.dtype)
        assert torch.equal(got, made.run(x, index, weight))


@every_kernel
def test_blocks_unpack_to_what_was_packed(chosen: Kernel, family: str) -> None:
    made = Made(chosen, spec_of(family, GATES["silu"], asym=True), torch.float32)
    count = len(made.packed) // 2
    for which, one in enumerate(made.spec.parts):
        assert one is not None
        for expert in (0, 4):
            back = unpack_block(made.packed[which * count:][:count], one, expert)
            want = made.weights[which][expert].tensors
            assert all(torch.equal(back.tensors[name], want[name]) for name in want)


def test_a_weight_may_stay_float() -> None:
    spec = spec_of("w8a8", GATES["silu"], group=None)
    made = Made(kernel("experts_loop"), spec, torch.float32)
    one_float = ExpertsSpec(experts=5, hidden=64, intermediate=96, gate=spec.gate, up=made.spec.up, down=None,
                            kernel="experts_loop")
    down = torch.stack([dequantize_weight(w, spec.down) for w in made.weights[1]])  # type: ignore[arg-type]
    count = len(made.packed) // 2
    index, weight = routing(5, 2, 5)
    x = activation(5, 64, torch.float32)
    got = torch.ops.qpass.experts(x, index, weight, [*made.packed[:count], down], [None, None], str(one_float))
    want = made.run(x, index, weight)
    assert 0 < float((got - want).abs().max() / want.abs().max()) < 0.02  # the second activation is not rounded
    assert ExpertsSpec.parse(str(one_float)) == one_float and one_float.family == "mixed"
