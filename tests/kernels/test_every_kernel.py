"""Every registered kernel that runs here agrees with float64: being in the table is enough to be tested."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import qpass.kernels.dispatch  # noqa: F401
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.kernels.registry import KERNELS, Kernel, LinearCall, load_builtin
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight

load_builtin()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
# group: (group_size or None, the K to try)
GROUPS = {"g32": (32, (32, 96, 320)), "g64": (64, (64, 192)), "g96": (96, (96, 288)), "g128": (128, (128, 384)),
          "channel": (None, (1, 64, 77, 200)), "tensor": (0, (77, 192))}
ROWS, COLUMNS = (1, 2, 3, 4, 7, 17, 34), (1, 31, 48, 70)


def spec_of(kernel: Kernel, family: str, n: int, k: int, group: str = "g32", *, asym: bool = False,
            asym_activation: bool = False) -> LinearSpec:
    size = GROUPS[group][0]
    granularity = "per_group" if size else "per_tensor" if size == 0 else "per_channel"
    weight = WeightArgs(bits=int(family[1]), granularity=granularity, group_size=size or None, symmetric=not asym)
    activation = ActivationArgs(symmetric=not asym_activation) if family.endswith("a8") else None
    return LinearSpec(family=family, weight=weight, activation=activation, out_features=n, in_features=k,
                      kernel=kernel.name)


def families_of(kernel: Kernel) -> list[str]:
    if isinstance(kernel.scheme, tuple):  # other weights than integers: tests/kernels/cpu/test_x86_decoded.py
        return [family for family in ("w4a16", "w5a16", "w3a8", "w6a8") if family in kernel.scheme]
    return ["w4a8", "w8a8", "w4a16", "w8a16", "w3a16", "w2a8"] if kernel.scheme == "*" else [kernel.scheme]


CASES = [pytest.param(kernel, family, id=kernel.name if kernel.scheme == family else f"{kernel.name}-{family}")
         for kernel in list(KERNELS.values()) if kernel.device in ("*", "cpu") and kernel.op == "linear"
         for family in families_of(kernel)]
every_kernel = pytest.mark.parametrize(("kernel", "family"), CASES)
every_dtype = pytest.mark.parametrize("dtype", [pytest.param(d, id=name) for name, d in DTYPES.items()])


def skip_unless_it_runs(kernel: Kernel, spec: LinearSpec, dtype: torch.dtype) -> None:
    call = LinearCall(spec=spec, device=torch.device("cpu"), dtype=dtype)
    why = kernel.why_not(call) or (kernel.prepare() if kernel.prepare else None)
    if why is not None:
        pytest.skip(why)


def random_weight(spec: LinearSpec, dtype: torch.dtype, seed: int = 0) -> CanonicalWeight:
    generator = torch.Generator().manual_seed(seed)
    # A shift of the mean gives asymmetric zero points something to do.
    weight = torch.randn(spec.out_features, spec.in_features, generator=generator) + 0.3
    return quantize_weight(weight.to(dtype), spec)


def packed_for(kernel: Kernel, weight: CanonicalWeight, spec: LinearSpec) -> list[Tensor]:
    packed = kernel.layout.pack(weight, spec)
    return [packed[name] for name in kernel.layout.names(spec)]


def oracle(x: Tensor, weight: CanonicalWeight, bias: Tensor | None, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the absolute values that were added, which rounding errors scale with."""
    q = weight.qweight.double().view(spec.out_features, spec.groups, -1)
    if weight.zero_point is not None:
        q = q - weight.zero_point.double().unsqueeze(-1)
    w = (q * weight.scale.double().unsqueeze(-1)).view(spec.out_features, spec.in_features)
    real = x.double()
    if spec.activation is not None and spec.activation.symmetric:
        codes, scale = quantize_symmetric(x)
        real = codes.double() * scale.double()
    elif spec.activation is not None:
        codes, scale, zero_point = quantize_asymmetric(x)
        real = (codes.double() - zero_point.double()) * scale.double()
    y, size = real @ w.t(), real.abs() @ w.abs().t()
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


def assert_close(y: Tensor, want: tuple[Tensor, Tensor], dtype: torch.dtype, context: object) -> None:
    exact, size = want
    assert y.dtype == dtype and y.shape == exact.shape, context
    # 4e-6: float32 sums of a few hundred terms; asymmetric activations add up to 255 times the zero point's share.
    allowed = HALF_ULP[dtype] * exact.abs() + 4e-6 * size + 2.0**-24
    worst = ((y.double() - exact).abs() / allowed).max() if y.numel() else torch.tensor(0.0)
    assert float(worst) <= 1, (context, float(worst))


@every_kernel
@every_dtype
@pytest.mark.parametrize("group", list(GROUPS))
def test_equals_float64(kernel: Kernel, family: str, dtype: torch.dtype, group: str) -> None:
    for i, k in enumerate(GROUPS[group][1]):
        skip_unless_it_runs(kernel, spec_of(kernel, family, 1, k, group), dtype)
        for j, n in enumerate(COLUMNS):
            spec = spec_of(kernel, family, n, k, group, asym=(i + j) % 3 == 2, asym_activation=(i + j) % 2 == 1)
            weight = random_weight(spec, dtype, seed=i * 10 + j)
            packed = packed_for(kernel, weight, spec)
            for m in (ROWS[(i + j) % len(ROWS)], ROWS[(i + 3 * j + 3) % len(ROWS)]):
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
                bias = None if (m + n) % 3 == 0 else torch.randn(n).to(dtype)
                y = kernel.forms["linear"](x, packed, bias, spec)
                assert_close(y, oracle(x, weight, bias, spec), dtype, (str(spec), m))


@every_kernel
@pytest.mark.parametrize("m", ROWS)
def test_any_number_of_rows(kernel: Kernel, family: str, m: int) -> None:
    for asym, asym_activation in ((False, False), (True, False), (False, True), (True, True)):
        spec = spec_of(kernel, family, 33, 192, "g64", asym=asym, asym_activation=asym_activation)
        skip_unless_it_runs(kernel, spec, torch.float32)
        weight = random_weight(spec, torch.float32)
        x = torch.randn(m, 192) + 0.5
        y = kernel.forms["linear"](x, packed_for(kernel, weight, spec), None, spec)
        assert_close(y, oracle(x, weight, None, spec), torch.float32, str(spec))


@every_kernel
@pytest.mark.parametrize(("group", "k"), [("g64", 1600), ("channel", 2113)])
def test_long_rows(kernel: Kernel, family: str, group: str, k: int) -> None:
    """Longer than the stretches in which kernels unpack weights; and a row is the same alone as among others."""
    for asym in (False, True):
        spec = spec_of(kernel, family, 33, k, group, asym=asym, asym_activation=not asym)
        skip_unless_it_runs(kernel, spec, torch.float32)
        weight = random_weight(spec, torch.float32)
        packed, x = packed_for(kernel, weight, spec), torch.randn(13, k)
        y = kernel.forms["linear"](x, packed, None, spec)
        assert_close(y, oracle(x, weight, None, spec), torch.float32, str(spec))
        if kernel.name != "linear_reference":
            assert torch.equal(y[7:9], kernel.forms["linear"](x[7:9], packed, None, spec))


@every_kernel
@every_dtype
def test_bias_of_another_dtype(kernel: Kernel, family: str, dtype: torch.dtype) -> None:
    spec = spec_of(kernel, family, 19, 64)
    skip_unless_it_runs(kernel, spec, dtype)
    weight, x = random_weight(spec, dtype), torch.randn(3, 64).to(dtype)
    for other in DTYPES.values():
        bias = torch.randn(19).to(other)
        y = kernel.forms["linear"](x, packed_for(kernel, weight, spec), bias, spec)
        assert_close(y, oracle(x, weight, bias, spec), dtype, other)


@every_kernel
def test_scales_of_another_dtype(kernel: Kernel, family: str) -> None:
    spec = spec_of(kernel, family, 19, 64)
    skip_unless_it_runs(kernel, spec, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    for dtype in DTYPES.values():
        weight = random_weight(spec, dtype)
        y = kernel.forms["linear"](x, packed_for(kernel, weight, spec), None, spec)
        assert_close(y, oracle(x, weight, None, spec), torch.bfloat16, dtype)


@every_kernel
def test_input_shapes(kernel: Kernel, family: str) -> None:
    spec = spec_of(kernel, family, 21, 96)
    skip_unless_it_runs(kernel, spec, torch.float32)
    weight = random_weight(spec, torch.float32)
    packed = packed_for(kernel, weight, spec)
    base = torch.randn(2, 5, 96)
    transposed = torch.randn(96, 6).t()
    strided = torch.randn(4, 192)[:, ::2]
    for x in (base, base[:, 1:4], transposed, strided, base[0, 0], base[:1, :1]):
        y = kernel.forms["linear"](x, packed, None, spec)
        assert_close(y, oracle(x, weight, None, spec), torch.float32, (x.shape, x.stride()))
    for empty in (torch.randn(0, 96), torch.randn(2, 0, 96)):
        y = kernel.forms["linear"](empty, packed, None, spec)
        assert y.shape == (*empty.shape[:-1], 21) and y.dtype == torch.float32


@every_kernel
@every_dtype
@pytest.mark.parametrize("symmetric", [pytest.param(True, id="sym"), pytest.param(False, id="asym")])
def test_codes_and_scales_are_those_of_the_reference(kernel: Kernel, family: str, dtype: torch.dtype,
                                                     symmetric: bool) -> None:
    if "linear_q" not in kernel.forms or not family.endswith("a8"):
        pytest.skip("takes no rounded activations")
    for k in (64, 96, 160):
        spec = spec_of(kernel, family, 37, k, asym_activation=not symmetric)
        skip_unless_it_runs(kernel, spec, dtype)
        packed = packed_for(kernel, random_weight(spec, dtype), spec)
        x = (torch.randn(9, k) * torch.logspace(-12, 4, 9).unsqueeze(-1)).to(dtype)
        x[3] = 0
        codes = (*quantize_symmetric(x), None) if symmetric else quantize_asymmetric(x)
        y = kernel.forms["linear_q"](*codes, packed, None, spec, dtype)
        assert torch.equal(y, kernel.forms["linear"](x, packed, None, spec)), k


@every_kernel
def test_list_forms_equal_single_calls(kernel: Kernel, family: str) -> None:
    if "linear_list" not in kernel.forms:
        pytest.skip("has no list form")
    for asym_activation in (False, True):
        specs = [spec_of(kernel, family, n, 128, group, asym=asym, asym_activation=asym_activation)
                 for n, group, asym in ((40, "g64", False), (17, "g32", True), (64, "channel", False))]
        skip_unless_it_runs(kernel, specs[0], torch.bfloat16)
        parts = [packed_for(kernel, random_weight(s, torch.bfloat16, seed=i), s) for i, s in enumerate(specs)]
        flat = [tensor for part in parts for tensor in part]
        bias: Sequence[Tensor | None] = [torch.randn(40), None, torch.randn(64).bfloat16()]
        for m in (1, 6):
            x = torch.randn(m, 128).bfloat16()
            several = kernel.forms["linear_list"](x, flat, bias, specs)
            single = [kernel.forms["linear"](x, p, b, s) for p, b, s in zip(parts, bias, specs, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(several, single, strict=True))
            if "linear_q_list" in kernel.forms:
                codes = quantize_asymmetric(x) if asym_activation else (*quantize_symmetric(x), None)
                several = kernel.forms["linear_q_list"](*codes, flat, bias, specs, torch.bfloat16)
                assert all(torch.equal(a, b) for a, b in zip(several, single, strict=True))


@every_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_in_not_finite_out(kernel: Kernel, family: str, bad: float) -> None:
    for asym_activation in (False, True):
        spec = spec_of(kernel, family, 20, 96, asym_activation=asym_activation)
        skip_unless_it_runs(kernel, spec, torch.float32)
        packed = packed_for(kernel, random_weight(spec, torch.float32), spec)
        for position in (0, 50, 95):
            x = torch.randn(3, 96)
            x[1, position] = bad
            y = kernel.forms["linear"](x, packed, None, spec)
            assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


@every_kernel
@pytest.mark.parametrize("group", list(GROUPS))
def test_pack_then_unpack_gives_the_same_bits(kernel: Kernel, family: str, group: str) -> None:
    for n, k in ((1, GROUPS[group][1][0]), (45, GROUPS[group][1][-1])):
        for asym in (False, True):
            spec = spec_of(kernel, family, n, k, group, asym=asym, asym_activation=asym)
            skip_unless_it_runs(kernel, spec, torch.bfloat16)
            weight = random_weight(spec, torch.bfloat16)
            packed = kernel.layout.pack(weight, spec)
            assert set(packed) == set(kernel.layout.names(spec))
            back = kernel.layout.unpack(packed, spec)
            assert set(back.tensors) == set(weight.tensors)
            for name, tensor in weight.tensors.items():
                assert back.tensors[name].dtype == tensor.dtype and torch.equal(back.tensors[name], tensor), name
