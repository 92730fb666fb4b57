"""The AVX512-VNNI and AMX kernels, compiled over emulated intrinsics, agree with float64 on any machine."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qpass.experts_spec import Gate
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from tests.kernels.cpu.emulated_experts import exact_experts, make_layer, run_experts
from tests.kernels.cpu.emulated_kernels import (
    AMX,
    COMPILER,
    DTYPES,
    VNNI,
    Codes,
    blocks_of,
    compile_emulation,
    make_integer_weight,
    make_weight,
    oracle,
    padded,
    power_of_two,
    product_f,
    product_q,
    random_codes,
    random_scale,
)

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 65)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


SHAPES = [  # group size (None: one group a row), K
    pytest.param(32, 96, id="g32-k96"), pytest.param(32, 320, id="g32-k320"), pytest.param(64, 128, id="g64"),
    pytest.param(96, 288, id="g96"), pytest.param(96, 96, id="g96-one"), pytest.param(128, 640, id="g128"),
    pytest.param(160, 480, id="g160"), pytest.param(576, 1152, id="g576"), pytest.param(None, 1, id="channel-k1"),
    pytest.param(None, 100, id="channel-k100"), pytest.param(None, 600, id="channel-k600"),
]
BITS = [pytest.param(4, id="w4"), pytest.param(8, id="w8")]
WEIGHTS = [pytest.param(True, id="wsym"), pytest.param(False, id="wasym")]
ACTIVATIONS = [pytest.param(True, id="xsym"), pytest.param(False, id="xasym")]


@pytest.mark.parametrize("x_symmetric", ACTIVATIONS)
@pytest.mark.parametrize("w_symmetric", WEIGHTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "k"), SHAPES)
def test_integers_are_exact(library: ctypes.CDLL, group: int | None, k: int, bits: int, w_symmetric: bool,
                            x_symmetric: bool) -> None:
    """With scales that are powers of two every rounding is exact, so float64 and the kernels agree to the bit."""
    torch.manual_seed(k * bits)
    w = make_weight(37, k, group, bits, w_symmetric, power_of_two)
    x = random_codes(ROWS[-1], k, x_symmetric, power_of_two)
    expected = oracle(w, x, None)[0].float()
    for m in (1, 3, 8, 9, 17, 33):
        assert torch.equal(product_q(library, AMX, w, x.rows(slice(m))), expected[:m]), m
    for dtype in DTYPES:  # whole sums have many ties in the 16-bit types, and overflow float16
        assert torch.equal(product_q(library, VNNI, w, x.rows(slice(13)), dtype=dtype), expected[:13].to(dtype)), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 96, 128, None])
def test_product_agrees_with_float64_and_across_instruction_sets(library: ctypes.CDLL, group: int | None, bits: int,
                                                                 dtype: torch.dtype) -> None:
    """Every number of rows, ordinary scales: close to float64, the same bits on VNNI and AMX, each row on its own."""
    torch.manual_seed(bits)
    k, n = 384, 45
    scale_dtype = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float16}[dtype]
    for symmetric in (True, False):
        w = make_weight(n, k, group, bits, symmetric, random_scale(scale_dtype))
        x = random_codes(ROWS[-1], k, symmetric, random_scale(torch.float32))
        bias = torch.randn(n).to(scale_dtype)
        expected, size = oracle(w, x, bias)
        every = product_q(library, AMX, w, x, bias, dtype)
        error = (every.double() - expected).abs()
        assert (error <= size * 2.0**-22 + expected.abs() * torch.finfo(dtype).eps / 2 + 1e-7).all()
        assert torch.equal(product_q(library, VNNI, w, x, bias, dtype), every)
        for m in ROWS:  # fewer rows, other rows in front, and the columns in two calls
            assert torch.equal(product_q(library, AMX, w, x.rows(slice(65 - m, 65)), bias, dtype, cut=2), every[-m:]), m


@pytest.mark.parametrize("x_symmetric", ACTIVATIONS)
@pytest.mark.parametrize(("group", "k"), [(32, 96), (32, 320), (64, 640), (96, 288), (128, 640), (160, 480)])
def test_integer_scales(library: ctypes.CDLL, group: int, k: int, x_symmetric: bool) -> None:
    """Exact to the bit with powers of two; with any scales close to float64, and on VNNI, AMX and any rows the same."""
    torch.manual_seed(k)
    w = make_integer_weight(37, k, group, power_of_two)
    x = random_codes(ROWS[-1], k, x_symmetric, power_of_two)
    expected = oracle(w, x, None)[0].float()
    for m in (1, 3, 8, 9, 17, 33):
        for isa in (VNNI, AMX):
            assert torch.equal(product_q(library, isa, w, x.rows(slice(m))), expected[:m]), (m, isa)
    w, x = make_integer_weight(37, k, group, random_scale(torch.float32)), random_codes(
        ROWS[-1], k, x_symmetric, random_scale(torch.float32))
    bias = torch.randn(37)
    expected64, size = oracle(w, x, bias)
    every = product_q(library, AMX, w, x, bias)
    assert ((every.double() - expected64).abs() <= size * 2.0**-22 + 1e-7).all()
    for m in ROWS:
        for isa in (VNNI, AMX):
            assert torch.equal(product_q(library, isa, w, x.rows(slice(65 - m, 65)), bias, cut=2), every[-m:]), (m, isa)


@pytest.mark.parametrize("isa", [pytest.param(VNNI, id="vnni"), pytest.param(AMX, id="amx")])
def test_extreme_integer_scales(library: ctypes.CDLL, isa: int) -> None:
    k = 256
    q = torch.tensor([-8, 7, 0, -1], dtype=torch.int8).repeat_interleave(8)[:, None].expand(32, k).contiguous()
    multiplier = torch.tensor([15, -15], dtype=torch.int8).repeat(16)[:, None].expand(32, 4).contiguous()
    codes = torch.tensor([-128, 127, 0, 1], dtype=torch.int8).repeat(5)[:17].unsqueeze(1).expand(17, k).contiguous()
    w = make_integer_weight(32, k, 64, torch.ones_like, q, multiplier)
    for m in (8, 17):
        x = Codes(q=codes[:m], scale=torch.ones(m), zero_point=None)
        assert torch.equal(product_q(library, isa, w, x), oracle(w, x, None)[0].float())


@pytest.mark.parametrize("isa", [pytest.param(VNNI, id="vnni"), pytest.param(AMX, id="amx")])
@pytest.mark.parametrize("bits", BITS)
def test_extreme_integers(library: ctypes.CDLL, bits: int, isa: int) -> None:
    """The largest codes, weights and zero points of either sign."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    k = 256
    q = torch.tensor([low, high, 0, -1], dtype=torch.int8).repeat_interleave(8).unsqueeze(1).expand(32, k).contiguous()
    codes = torch.tensor([-128, 127, 0, 1], dtype=torch.int8).repeat(5)[:17].unsqueeze(1).expand(17, k).contiguous()
    for symmetric, group in ((True, None), (False, None), (True, 32), (False, 128)):
        w = make_weight(32, k, group, bits, symmetric, torch.ones_like, q)
        packed = w.packed[2]
        if w.zero_point is not None and packed is not None:
            w.zero_point[:] = torch.tensor([low, high], dtype=torch.int8).repeat(16)[:, None]
            packed.copy_(blocks_of(w.zero_point, 0))
        x = Codes(q=codes, scale=torch.ones(17), zero_point=None)
        assert torch.equal(product_q(library, isa, w, x), oracle(w, x, None)[0].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_symmetric", WEIGHTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "k"), [(32, 96), (96, 288), (128, 384), (None, 130)])
def test_float_product(library: ctypes.CDLL, group: int | None, k: int, bits: int, w_symmetric: bool,
                       dtype: torch.dtype) -> None:
    """Weights are exact in bf16 and x is split into bf16 parts that sum to it: float32 accuracy on every path."""
    torch.manual_seed(k)
    w = make_weight(45, k, group, bits, w_symmetric, random_scale(torch.bfloat16))
    x, bias = torch.randn(40, k).to(dtype), torch.randn(45).to(torch.float16)
    expected = x.double() @ w.dense.t() + bias.double()
    bound = (x.double().abs() @ w.dense.abs().t() + 1) * 2.0**-21
    for isa in (VNNI, AMX):
        every = product_f(library, isa, w, x, bias)
        assert ((every.double() - expected).abs() <= bound).all()
        for m in (1, 2, 5, 16, 17, 32, 33):
            assert torch.equal(product_f(library, isa, w, x[40 - m:], bias, cut=2), every[-m:]), m
    assert torch.equal(product_f(library, AMX, w, x, bias, widened=True), every)


def test_float_product_beyond_a_stretch(library: ctypes.CDLL) -> None:
    """More inputs than are packed at once, in groups and in none."""
    torch.manual_seed(0)
    for k, group in ((2176, 128), (2100, None), (2112, 192)):
        w = make_weight(40, k, group, 4, True, random_scale(torch.bfloat16))
        x = torch.randn(35, k).bfloat16()
        bound = (x.double().abs() @ w.dense.abs().t()) * 2.0**-20
        every = product_f(library, AMX, w, x)
        assert ((every.double() - x.double() @ w.dense.t()).abs() <= bound).all()
        for m in (1, 33):
            assert torch.equal(product_f(library, AMX, w, x[35 - m:]), every[-m:]), (k, m)


def test_zero_points_that_are_no_nibbles(library: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    w = make_weight(32, 256, 64, 4, False, power_of_two)
    packed = w.packed[2]
    assert w.zero_point is not None and packed is not None
    w.zero_point[:] = torch.randint(-128, 128, w.zero_point.shape, dtype=torch.int8)
    w.zero_point[3], w.zero_point[4] = 8, 9
    packed.copy_(blocks_of(w.zero_point, 0))
    x = torch.randint(-9, 10, (3, 256)).bfloat16()
    for isa in (VNNI, AMX):
        for rows in (x, x[1:2]):
            assert torch.equal(product_f(library, isa, w, rows).double(), rows.double() @ w.dense.t())


def test_float_product_of_extreme_values(library: ctypes.CDLL) -> None:
    """Splitting neither overflows near the largest float nor turns an infinite value into NaN."""
    torch.manual_seed(0)
    w = make_weight(32, 64, None, 4, True, torch.ones_like, torch.ones(32, 64, dtype=torch.int8))
    x = torch.zeros(17, 64)
    x[0, 3], x[1, 3], x[2, 3], x[3, 3], x[4, 3] = 3.4028234e38, float("inf"), float("nan"), -float("inf"), 1e-30
    for isa in (VNNI, AMX):
        y = product_f(library, isa, w, x)
        assert torch.equal(y.nan_to_num(5), x.sum(1, keepdim=True).expand(17, 32).nan_to_num(5))


@pytest.mark.parametrize("symmetric", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_is_the_reference_bit_for_bit(library: ctypes.CDLL, dtype: torch.dtype, symmetric: bool) -> None:
    torch.manual_seed(0)
    for k in (1, 15, 16, 31, 33, 64, 100, 257):
        x = torch.randn(12, k) * torch.exp2(torch.arange(-6.0, 6.0))[:, None]
        x[1], x[2, 0], x[3, -1], x[4, k // 2] = 0, float("nan"), float("inf"), -float("inf")
        x[5], x[6] = x[5].abs(), -x[6].abs()
        x[7] = torch.arange(k) % 255 - 127.0  # scale 1: x / scale falls on integers
        x[8] = (torch.arange(k) % 255 - 127.0) / 2  # and on halves
        x[9] *= 1e-12
        x = x.to(dtype)
        kp = padded(k, 64)
        q = torch.full((12, kp), 99, dtype=torch.int8)
        scale, zero_point, sums = torch.zeros(12), torch.zeros(12), torch.zeros(12, kp // 32, dtype=torch.int32)
        results = (ctypes.c_void_p(t.data_ptr()) for t in (q, scale, zero_point, sums))
        library.emulated_quantize(VNNI, ctypes.c_void_p(x.data_ptr()), DTYPES[dtype],
                                  *map(ctypes.c_int64, (12, k, kp)), int(not symmetric), *results)
        expected = quantize_symmetric(x) if symmetric else quantize_asymmetric(x)
        finite = expected[1].isfinite().flatten()
        assert torch.equal(q[finite, :k], expected[0][finite])
        assert (q[:, k:] == 0).all()
        assert torch.equal(sums, q.view(12, -1, 32).sum(-1, dtype=torch.int32))
        torch.testing.assert_close(scale, expected[1].flatten(), rtol=0, atol=0, equal_nan=True)
        if not symmetric:
            torch.testing.assert_close(zero_point, expected[2].flatten(), rtol=0, atol=0, equal_nan=True)


EXPERTS = [
    pytest.param(4, True, 32, id="w4a8"), pytest.param(4, False, 32, id="w4a8-asym"),
    pytest.param(8, True, None, id="w8a8"), pytest.param(4, None, 32, id="w4a16"),
    pytest.param(8, None, None, id="w8a16"),
]


@pytest.mark.parametrize("isa", [pytest.param(VNNI, id="vnni"), pytest.param(AMX, id="amx")])
@pytest.mark.parametrize(("bits", "symmetric", "group"), EXPERTS)
def test_experts(library: ctypes.CDLL, bits: int, symmetric: bool | None, group: int | None, isa: int) -> None:
    """Uneven routing over few and many rows an expert, sentinels, biases: float64's result, each token on its own."""
    torch.manual_seed(bits)
    layer = make_layer(4, 64, 96, group, bits, symmetric, random_scale(torch.bfloat16), Gate(function="silu"),
                       biased=group is None, w_symmetric=group is None)
    x = torch.randn(30, 64)
    index = torch.randint(0, 5, (30, 2))
    index[:20, 0] = 1  # one expert has enough rows for tiles
    weight = torch.rand(30, 2)
    got = run_experts(library, isa, layer, x, index, weight)
    want = exact_experts(layer, x, index, weight)
    # A code of the second quantization may differ by one where exp is computed another way.
    bound = (1e-5 if symmetric is None else 4e-3) * want.abs().amax() + 1e-6 * want.abs()
    assert ((got.double() - want).abs() <= bound).all(), float((got.double() - want).abs().max())
    if symmetric is not None:
        assert torch.equal(got, run_experts(library, VNNI if isa == AMX else AMX, layer, x, index, weight))
        for t in (0, 21):
            alone = run_experts(library, isa, layer, x[t, None].contiguous(), index[t, None].contiguous(),
                                weight[t, None].contiguous())
            assert torch.equal(alone[0], got[t])


@pytest.mark.parametrize(("which", "message"), [
    (0, "without a tile configuration"), (1, "at most 16 rows"), (2, "palette"), (3, "reserved byte"),
    (4, "not configured"), (5, "three different tiles"), (6, "unaligned address"),
])
def test_emulation_faults_where_hardware_does(library: ctypes.CDLL, which: int, message: str) -> None:
    code = f"import ctypes; ctypes.CDLL({library._name!r}).emulated_misuse({which})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0 and message in ran.stderr


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The tests above, with address and undefined-behaviour checks compiled in."""
    built = compile_emulation(tmp_path, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    asan = subprocess.run([str(COMPILER), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "QPASS_TEST_EMULATED_LIBRARY": str(built), "LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    tests = ["-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider", "-k", "not sanitizers and not faults"]
    ran = subprocess.run([sys.executable, "-m", "pytest", *tests, __file__], env=environment, capture_output=True,
                         text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
