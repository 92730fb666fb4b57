"""Layers of experts, their grouped products interpreted, agree with float64 token by token, however they are routed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.experts_spec import ExpertsSpec, Gate
from qpass.kernels.cuda.experts import rows_of, run
from qpass.kernels.cuda.layouts import CUDA_TILES, names
from qpass.kernels.cuda.routing import group_rows
from qpass.kernels.experts_choice import pack_blocks
from qpass.kernels.reference.experts import apply_gate
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight, quantize_weight
from tests.kernels.cuda.products import FP8, INT8, INT8_ASYM, activation_rows, spec_for, weight_args

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GATE = Gate(function="silu")


class Made:
    """Random experts, packed, and in float64."""

    def __init__(self, weight: str, activation: ActivationArgs | None, dtype: torch.dtype, *, experts: int = 5,
                 hidden: int = 64, intermediate: int = 96, gate: Gate = GATE, biases: bool = False) -> None:
        family = "linear_reference"
        parts = [spec_for(weight_args(weight), activation, n, k, family)
                 for n, k in ((intermediate * (2 if gate.gated else 1), hidden), (hidden, intermediate))]
        family = f"linear_{parts[0].family}_triton"
        parts = [part.on(family) for part in parts]
        self.dtype, self.activation = dtype, activation
        self.spec = ExpertsSpec(experts=experts, hidden=hidden, intermediate=intermediate, gate=gate, up=parts[0],
                                down=parts[1])
        self.packed: list[Tensor] = []
        self.values: list[list[Tensor]] = []
        draw = torch.Generator().manual_seed(3)
        for part in parts:
            weights = [quantize_weight((torch.randn(part.shape, generator=draw) / 8).to(dtype), part)
                       for _ in range(experts)]
            self.values.append([dequantize_weight(w, part).double() for w in weights])
            self.packed += self._blocks(weights, part)
        self.bias = [torch.randn(experts, part.out_features) if biases else None for part in parts]

    def _blocks(self, weights: list[CanonicalWeight], part: LinearSpec) -> list[Tensor]:
        blocks = pack_blocks(weights, part, len(weights))
        assert set(blocks) == set(names(part)) and CUDA_TILES.even is not None
        return [blocks[name] for name in names(part)]

    def run(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return run(rows_of(x, self.spec), index, weight, self.packed, self.bias, self.spec, self.dtype)

    def exact(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], self.spec.hidden, dtype=torch.float64)
        for t in range(x.shape[0]):
            for j in range(index.shape[1]):
                e = int(index[t, j])
                if not 0 <= e < self.spec.experts:
                    continue
                y = activation_rows(x[t, None], self.activation)[1] @ self.values[0][e].t()
                y = y if self.bias[0] is None else y + self.bias[0][e].double()
                h = apply_gate(y.float(), self.spec.gate)
                h = h if self.activation is not None else h.to(self.dtype)
                z = activation_rows(h, self.activation)[1] @ self.values[1][e].t()
                z = z if self.bias[1] is None else z + self.bias[1][e].double()
                total[t] += float(weight[t, j]) * z[0]
        return total

    def check(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        got, want = self.run(x, index, weight), self.exact(x, index, weight.nan_to_num(0))
        # A code of the second activation may be one off where the first product rounds otherwise: one in 127 of the
        # largest number of a row, and a few of them.
        slack = {FP32: 2e-3, FP16: 4e-3, BF16: 2e-2}[self.dtype]
        assert got.dtype == self.dtype and torch.isfinite(got).all()
        assert float((got.double() - want).abs().max()) <= slack * (float(want.abs().max()) + 1e-6)
        return got


def routing(tokens: int, places: int, experts: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(experts, generator=draw)[:places] for _ in range(tokens)])
    return index, torch.rand(tokens, places, generator=draw)


CASES = [("int4:g32", None), ("int4:g32:asym", INT8), ("int8:channel", INT8_ASYM), ("int8:channel", None),
         ("fp8:channel", FP8), ("mxfp4:g32", None), ("int4:g32:integer", INT8)]
every_case = pytest.mark.parametrize(("weight", "activation"), CASES, ids=[
    f"{w}-x-{a.number if a else 'float'}{'' if a is None or a.symmetric else '-asym'}" for w, a in CASES])


@every_case
def test_equals_float64(weight: str, activation: ActivationArgs | None) -> None:
    made = Made(weight, activation, FP16, biases=True)
    made.check(torch.randn(7, 64).half(), *routing(7, 3, 5))


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_equals_float64_at_other_dtypes(weight: str, activation: ActivationArgs | None, dtype: torch.dtype) -> None:
    for gate in (GATE, Gate(function="relu2", gated=False),
                 Gate(function="silu", alpha=1.702, limit=0.7, up_limit=0.5, shift=1.0)):
        made = Made(weight, activation, dtype, gate=gate, biases=gate.shift != 0)
        made.check(torch.randn(40, 64).to(dtype), *routing(40, 2, 5))


def test_one_token_reads_only_its_experts() -> None:
    """The scales of experts that nobody chose are NaN: a program that read them would show it."""
    made = Made("int8:channel", INT8, FP32)
    for tensor in made.packed:
        if tensor.is_floating_point():
            tensor[[0, 2, 4]] = torch.nan
    got = made.run(torch.randn(1, 64), torch.tensor([[1, 3]]), torch.rand(1, 2))
    assert torch.isfinite(got).all() and group_rows(torch.tensor([[1, 3]]), 5, 16).owners.tolist() == [1, 3]


def test_uneven_routing_and_empty_experts() -> None:
    made = Made("int4:g32", None, FP16)
    x = torch.randn(6, 64).half()
    for index in (torch.full((6, 1), 3), torch.tensor([[0, 4]] * 6), torch.tensor([[2, 2]] * 6)):
        made.check(x, index, torch.rand(index.shape))
    assert made.run(x[:0], torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 64)


def test_sentinels_add_nothing() -> None:
    made = Made("int8:channel", INT8, FP32)
    index = torch.tensor([[0, 5], [5, 5], [5, 2], [-1, 4]], dtype=torch.int32)
    weight = torch.rand(4, 2)
    weight[1] = torch.nan
    assert not made.check(torch.randn(4, 64), index, weight)[1].any()


@pytest.mark.parametrize(("tokens", "places", "experts", "block"), [(1, 8, 64, 16), (40, 2, 5, 16), (3, 1, 3, 32),
                                                                    (33, 4, 4, 64)])
def test_every_place_stands_in_a_block_of_its_expert(tokens: int, places: int, experts: int, block: int) -> None:
    index, _ = routing(tokens, places, experts)
    index[0, 0] = experts  # lives elsewhere
    made = group_rows(index, experts, block)
    assert made.slots.numel() == made.owners.numel() * block and made.slots.dtype == made.owners.dtype == torch.int32
    seen = []
    for b, owner in enumerate(made.owners.tolist()):
        slots = [s for s in made.slots[b * block:(b + 1) * block].tolist() if s < index.numel()]
        assert slots or owner == -1 or owner >= 0
        assert all(int(index.view(-1)[s]) == owner for s in slots)
        seen += slots
    assert sorted(seen) == [i for i, e in enumerate(index.view(-1).tolist()) if e < experts]
