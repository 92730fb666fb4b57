"""Numbers: reference, eager kernel and compiled graph give one tensor the same integers and scales, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.kernels.reference.linear import linear_q_reference, linear_reference
from qpass.kernels.registry import KERNELS, LinearCall, kernel, register_kernel
from qpass.scheme import preset
from qpass.spec import LinearSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 37  # more than a vector, and no multiple of one


def rows(dtype):
    """Random rows, ties, zeros, the smallest and the largest numbers, NaN and infinities."""
    ties = torch.arange(WIDTH * 6).reshape(6, WIDTH) - 110.5
    ties[:, 0] = 127
    small = torch.tensor([1e-38, torch.finfo(dtype).tiny, 1e-10, 2e-8]).unsqueeze(1).expand(4, WIDTH)
    large = torch.full((2, WIDTH), torch.finfo(dtype).max)
    large[1, ::2] *= -1
    odd = torch.randn(3, WIDTH)
    odd[0, 3], odd[1, 5], odd[2, 36] = float("nan"), float("inf"), -float("inf")
    return torch.cat([torch.randn(6, WIDTH), ties, torch.zeros(1, WIDTH), small, large, odd]).to(dtype)


def same_bits(a, b):
    if a.dtype == torch.int8:
        return torch.equal(a, b)
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.fixture
def seen():
    """The integers and scales that a kernel of this name was given, call by call."""
    calls = []

    @register_kernel(scheme="*", device="*", name="linear_test_probe", priority=-1)
    def linear(x, packed, bias, spec):
        symmetric = spec.activation.symmetric
        quantized = quantize_symmetric(x) if symmetric else (quantize_asymmetric(x))
        calls.append(tuple(t.clone() for t in quantized))
        return linear_reference.forms["linear"](x, packed, bias, spec)

    @linear.form("linear_q")
    def linear_q(xq, x_scale, x_zero_point, packed, bias, spec, dtype):
        calls.append(tuple(t.clone() for t in (xq, x_scale, x_zero_point) if t is not None))
        return linear_q_reference(xq, x_scale, x_zero_point, packed, bias, spec, dtype)

    yield calls
    del KERNELS["linear_test_probe"]


def test_compiled_quantization_equals_the_reference(make_quantized, installed, seen):
    layers = nn.ModuleList(make_quantized(nn.Linear(WIDTH, 4, dtype=dtype), scheme, "linear_test_probe")
                           for dtype in DTYPES for scheme in ("w8a8", "w4a8_channel"))
    inputs = [rows(dtype) for dtype in DTYPES for _ in range(2)]

    def run(tensors):
        return [layer(x) for layer, x in zip(layers, tensors, strict=True)]

    with torch.no_grad():
        eager = run(inputs)
        expected, seen[:] = list(seen), []
        compiled = torch.compile(run, fullgraph=True, dynamic=True)(inputs)
    assert len(expected) == len(seen) == 6
    for want, got, x in zip(expected, seen, inputs, strict=True):
        assert all(same_bits(a, b) for a, b in zip(want, got, strict=True)), x.dtype
        reference = quantize_symmetric(x) if len(want) == 2 else quantize_asymmetric(x)
        assert all(same_bits(a, b) for a, b in zip(reference, got, strict=True)), x.dtype
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_fused_producer_moves_a_code_by_one_at_most(make_quantized, installed, seen):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, dtype=torch.bfloat16))
            self.linear = make_quantized(nn.Linear(64, 4, dtype=torch.bfloat16), "w8a8", "linear_test_probe")

        def forward(self, x):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.linear(self.weight * h.to(x.dtype))

    model, x = Scaled(), torch.randn(64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)
        torch.compile(model, fullgraph=True)(x)
    (eager, eager_scale), (compiled, compiled_scale) = seen
    assert (eager.int() - compiled.int()).abs().max() <= 1
    torch.testing.assert_close(compiled_scale, eager_scale, rtol=2**-7, atol=0)


def native_kernels():
    """The better kernels of each family that run here; a machine without any has only the reference, tested above."""
    kernel("linear_reference")
    found = []
    for family in ("w4a8", "w8a8", "w4a16", "w8a16"):
        call = LinearCall(spec=spec_of(family, "none"), device=torch.device("cpu"), dtype=torch.bfloat16)
        able = [k for k in KERNELS.values() if k.op == "linear" and k.scheme == family and k.priority > 0
                and k.why_not(call) is None]
        found += [max(able, key=lambda k: k.priority).name] if able else []
    return found


def spec_of(family, name):
    scheme = preset(family)
    return LinearSpec(family=scheme.family, weight=scheme.weight, activation=scheme.activation, out_features=8,
                      in_features=256, kernel=name)


def test_compiled_native_kernels_equal_eager_bit_for_bit(installed):
    from qpass.layers.packed_layers import QuantLinear
    from qpass.weight import quantize_weight

    names = native_kernels()
    if not names:
        pytest.skip("no native kernel runs on this machine")
    layers = []
    for name in names:
        assert kernel(name).prepare is None or kernel(name).prepare() is None
        for _ in range(2):  # two of each: the merged call is the one that runs
            spec = spec_of(kernel(name).scheme, name)
            layers.append(QuantLinear(quantize_weight(torch.randn(8, 256), spec), None, spec, torch.bfloat16))

    def run(x):
        return [layer(x) for layer in layers]

    x = torch.randn(5, 256).bfloat16()
    with torch.no_grad():
        for got, want in zip(torch.compile(run, fullgraph=True)(x), run(x), strict=True):
            assert torch.equal(got, want)
