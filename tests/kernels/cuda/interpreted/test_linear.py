"""The program `product`, interpreted, agrees with float64 for every format, granularity, dtype and odd size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.kernels.cuda.configs import Config
from qpass.kernels.cuda.launch import Rows, multiply, operands
from qpass.kernels.cuda.linear import forward, forward_q
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric, static_rows
from tests.kernels.cuda.products import (
    FP8,
    FP8_GROUPS,
    INT8,
    INT8_ASYM,
    activation_rows,
    make_product,
    spec_for,
    weight_args,
    worst_error,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = Config(block_m=16, block_n=32, block_k=64)
ACTIVATIONS = {"float": None, "int8": INT8, "int8-asym": INT8_ASYM, "fp8": FP8, "fp8-g128": FP8_GROUPS}
# weight, activation, dtype, N, K, M
QUICK = [
    ("int4:g32", "float", BF16, 31, 96, 3), ("int4:g128:asym", "float", FP16, 70, 384, 17),
    ("int4:g64", "float", FP32, 33, 192, 2), ("int4:g96:asym", "float", BF16, 17, 288, 2),
    ("int4:channel", "float", FP16, 33, 77, 1), ("int4:tensor:asym", "float", BF16, 5, 1, 3),
    ("int8:g32:asym", "float", FP16, 33, 96, 2), ("int8:channel", "float", BF16, 31, 77, 34),
    ("int3:g64", "float", BF16, 20, 128, 2),
    ("int4:g32", "int8", BF16, 31, 160, 3), ("int4:g64:asym", "int8", FP16, 31, 192, 18),
    ("int4:g128", "int8-asym", BF16, 70, 256, 2), ("int4:g32:asym", "int8-asym", FP32, 31, 96, 3),
    ("int4:channel:asym", "int8", BF16, 31, 77, 2), ("int4:g64:integer", "int8", BF16, 31, 192, 3),
    ("int8:channel", "int8", FP16, 31, 77, 3), ("int8:channel:asym", "int8-asym", BF16, 19, 200, 2),
    ("int8:g64", "int8", BF16, 19, 192, 2), ("int8:tensor", "int8", BF16, 19, 33, 2),
    ("nvfp4:g16", "float", BF16, 33, 80, 3), ("nvfp4_mul:g16", "float", FP16, 33, 192, 3),
    ("nvfp4_reciprocal:g16", "float", FP32, 33, 64, 3), ("mxfp4:g32", "float", BF16, 33, 96, 3),
    ("mxfp8:g32", "float", FP16, 33, 96, 3), ("nf4:g64", "float", FP16, 33, 192, 3),
    ("fp4:g64", "float", FP16, 9, 64, 2),
    ("fp8:channel", "float", BF16, 33, 77, 3), ("fp8:b128", "float", FP16, 133, 256, 2),
    ("fp8:channel", "fp8", BF16, 33, 77, 3), ("fp8:tensor", "fp8", FP16, 33, 96, 2),
    ("fp8:b128", "fp8-g128", BF16, 133, 256, 3), ("int4:g128", "fp8", BF16, 33, 256, 3),
    ("int4:g64:asym", "fp8", FP16, 33, 192, 3), ("mxfp4:g32", "fp8-g128", BF16, 33, 256, 3),
]
SLOW = [(weight, activation, dtype, n, k, m)
        for weight in ("int4:g32", "int4:g64:asym", "int4:g96", "int4:g128:asym", "int4:channel", "int8:g32:asym",
                       "int8:g128", "int8:channel")
        for activation in ("float", "int8", "int8-asym") for dtype in (BF16, FP16, FP32)
        for n, k, m in ((70, 384, 34), (129, 1152, 7))]


def run_case(weight: str, activation: ActivationArgs | None, dtype: torch.dtype, n: int, k: int, m: int,
             config: Config | None = None) -> float:
    made = make_product(spec_for(weight_args(weight), activation, n, k), dtype, seed=n)
    x = torch.randn(m, k).to(dtype)
    bias = None if (m + n) % 3 == 0 else torch.randn(n)
    rows, real = activation_rows(x, activation)
    y, = multiply(rows, operands(made.packed, [bias], [made.spec]), dtype, config=config)
    assert y.dtype == dtype
    return worst_error(y, real, made, bias)


def ids(cases: list[tuple[str, str, torch.dtype, int, int, int]]) -> list[str]:
    return [f"{w}-x-{a}-{str(d)[6:]}-{n}x{k}-{m}" for w, a, d, n, k, m in cases]


@pytest.mark.parametrize(("weight", "activation", "dtype", "n", "k", "m"), QUICK, ids=ids(QUICK))
def test_equals_float64(weight: str, activation: str, dtype: torch.dtype, n: int, k: int, m: int) -> None:
    assert run_case(weight, ACTIVATIONS[activation], dtype, n, k, m) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "activation", "dtype", "n", "k", "m"), SLOW, ids=ids(SLOW))
def test_equals_float64_at_larger_sizes(weight: str, activation: str, dtype: torch.dtype, n: int, k: int, m: int
                                        ) -> None:
    assert run_case(weight, ACTIVATIONS[activation], dtype, n, k, m) <= 1


@pytest.mark.parametrize("activation", [None, INT8, INT8_ASYM], ids=["float", "int8", "int8-asym"])
@pytest.mark.parametrize("splits", [2, 4, 8])
def test_parts_of_k_add_up(activation: ActivationArgs | None, splits: int) -> None:
    config = Config(block_m=16, block_n=32, block_k=64, splits=splits)
    assert run_case("int4:g64:asym", activation, FP16, 31, 320, 3, config) <= 1


def test_many_blocks_of_rows() -> None:
    """More than eight blocks of rows, and several of the weight: every block is computed once."""
    assert run_case("int8:channel", INT8, FP32, 70, 32, 150, SMALL) <= 1


@pytest.mark.parametrize("activation", [None, INT8], ids=["float", "int8"])
def test_a_list_of_weights_is_as_single_calls(activation: ActivationArgs | None) -> None:
    texts = ["int4:g64:asym", "int4:g64:asym", "int4:g64:asym", "int4:g64:asym", "int4:g32"]
    made = [make_product(spec_for(weight_args(text), activation, n, 128), FP16, seed=n)
            for text, n in zip(texts, (40, 17, 70, 1, 33), strict=True)]
    bias: list[Tensor | None] = [torch.randn(40), torch.randn(17), None, torch.randn(1), None]
    x = torch.randn(3, 128).half()
    packed = [tensor for one in made for tensor in one.packed]
    several = forward(x, packed, bias, [one.spec for one in made])
    for y, one, b in zip(several, made, bias, strict=True):
        assert torch.equal(y, forward(x, one.packed, [b], [one.spec])[0])
        assert worst_error(y, activation_rows(x, activation)[1], one, b) <= 1


def test_shapes_and_empty_batches() -> None:
    made = make_product(spec_for(weight_args("int4:g32"), INT8, 21, 96), FP32)
    base = torch.randn(2, 5, 96)
    for x in (base, base[:, 1:4], torch.randn(96, 6).t(), base[0, 0], torch.randn(0, 96), torch.randn(2, 0, 96)):
        y = forward(x, made.packed, [None], [made.spec])[0]
        real = activation_rows(x.reshape(-1, 96), INT8)[1] if x.numel() else torch.zeros(0, 96).double()
        assert y.shape == (*x.shape[:-1], 21) and worst_error(y.reshape(-1, 21), real, made, None) <= 1


def test_a_static_scale_is_one_for_all_rows() -> None:
    made = make_product(spec_for(weight_args("int8:channel"), INT8_ASYM, 21, 96), FP32)
    codes = torch.randint(-128, 128, (2, 3, 96), dtype=torch.int8)
    scale, zero_point = static_rows(codes, torch.tensor([0.03]), torch.tensor([5], dtype=torch.int8))
    y = forward_q(codes, scale, zero_point, made.packed, [None], [made.spec], FP32)[0]
    real = (codes.double() - 5) * torch.tensor(0.03).double()
    assert worst_error(y.view(6, 21), real.view(6, 96), made, None) <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", [None, INT8, INT8_ASYM, FP8], ids=["float", "int8", "int8-asym", "fp8"])
def test_not_finite_in_not_finite_out(activation: ActivationArgs | None, bad: float) -> None:
    made = make_product(spec_for(weight_args("int4:g32"), activation, 20, 96), FP32)
    x = torch.randn(3, 96)
    x[1, 50] = bad
    y = forward(x, made.packed, [None], [made.spec])[0]
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


def test_codes_of_activations_are_those_given() -> None:
    made = make_product(spec_for(weight_args("int4:g32"), INT8, 37, 96), FP32)
    asym = make_product(spec_for(weight_args("int4:g32"), INT8_ASYM, 37, 96), FP32)
    x = torch.randn(5, 96) * torch.logspace(-12, 4, 5).unsqueeze(-1)
    x[3] = 0
    for one, codes in ((made, (*quantize_symmetric(x), None)), (asym, quantize_asymmetric(x))):
        y = forward_q(*codes, one.packed, [None], [one.spec], FP32)[0]
        assert torch.equal(y, forward(x, one.packed, [None], [one.spec])[0])


def test_rows_do_not_depend_on_the_others() -> None:
    made = make_product(spec_for(weight_args("int4:g64"), None, 40, 128), FP16)
    x = torch.randn(9, 128).half()
    weights = operands(made.packed, [None], [made.spec])
    whole, = multiply(Rows(x=x), weights, FP16, config=SMALL)
    alone, = multiply(Rows(x=x[4:5].contiguous()), weights, FP16, config=SMALL)
    assert torch.equal(whole[4:5], alone)
