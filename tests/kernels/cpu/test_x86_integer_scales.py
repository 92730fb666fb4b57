"""Integer scales on the x86 kernels: found when packing, unpacked bit for bit, and the same results by every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.kernels import isa
from qpass.kernels.cpu import native, x86
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.kernels.reference.linear import linear_q_reference
from qpass.kernels.registry import Kernel, kernel
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=native.refuses() or "")
HERE = [short for short, (name, _) in x86.ISAS.items() if name in isa.machine_has()]
every_isa = pytest.mark.parametrize("short", HERE)


def spec_of(short: str, n: int, k: int, group: int, *, symmetric: bool = True, scales: str = "integer") -> LinearSpec:
    weight = WeightArgs(bits=4, granularity="per_group", group_size=group, scales=scales)  # type: ignore[arg-type]
    return LinearSpec(family="w4a8", weight=weight, activation=ActivationArgs(symmetric=symmetric), out_features=n,
                      in_features=k, kernel=f"linear_w4a8_{short}")


def packed_of(weight: CanonicalWeight, spec: LinearSpec) -> tuple[Kernel, list[Tensor]]:
    found = kernel(spec.kernel)
    why = found.prepare() if found.prepare else None
    assert why is None, why
    packed = found.layout.pack(weight, spec)
    return found, [packed[name] for name in found.layout.names(spec)]


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_found_in_any_weight_and_unpacked_bit_for_bit(short: str, dtype: torch.dtype) -> None:
    made = spec_of(short, 45, 160, 32)
    weight = quantize_weight(torch.randn(45, 160).to(dtype), made)
    loaded = spec_of(short, 45, 160, 32, scales="amax")  # a checkpoint does not say how its scales were chosen
    for spec in (made, loaded):
        found, packed = packed_of(weight, spec)
        assert packed[1].dtype == torch.int8 and packed[1].shape == (4, 5 + 5, 16)
        named = dict(zip(found.layout.names(spec), packed, strict=True))
        back = found.layout.unpack(named, spec)
        for name, tensor in weight.tensors.items():
            assert back.tensors[name].dtype == tensor.dtype and torch.equal(back.tensors[name], tensor), name
        assert found.layout.rows is not None
        ids = torch.tensor([44, 0, 17, 0])
        assert torch.equal(found.layout.rows(named, spec, ids).scale, weight.scale[ids])
    free = quantize_weight(torch.randn(45, 160).to(dtype), loaded)
    assert packed_of(free, loaded)[1][1].dtype == dtype


@every_isa
@pytest.mark.parametrize("symmetric", [True, False], ids=["xsym", "xasym"])
@pytest.mark.parametrize(("group", "k"), [(32, 96), (64, 192), (96, 288), (128, 640)])
def test_agrees_with_the_reference(short: str, group: int, k: int, symmetric: bool) -> None:
    spec = spec_of(short, 45, k, group, symmetric=symmetric)
    weight = quantize_weight(torch.randn(45, k) + 0.1, spec)
    found, packed = packed_of(weight, spec)
    canonical = [weight.qweight, weight.scale]
    bias = torch.randn(45)
    for m in (1, 2, 3, 4, 7, 17, 34):
        x = torch.randn(m, k)
        codes = (*quantize_symmetric(x), None) if symmetric else quantize_asymmetric(x)
        y = found.forms["linear_q"](*codes, packed, bias, spec, torch.float32)
        want = linear_q_reference(*codes, canonical, bias, spec, torch.float32)
        size = (codes[0].double().abs() + (0 if codes[2] is None else codes[2].abs())) * codes[1]
        size = size @ (weight.qweight.double().abs() * weight.scale.double().abs().repeat_interleave(group, 1)).t()
        assert ((y - want).abs() <= 4e-6 * size + 1e-6).all(), m
        assert torch.equal(y, found.forms["linear"](x, packed, bias, spec))


@every_isa
def test_powers_of_two_are_exact(short: str) -> None:
    spec = spec_of(short, 40, 256, 64)
    q = torch.randint(-8, 8, (40, 256), dtype=torch.int8)
    q[:8], q[8:16] = -8, 7
    multiplier = torch.randint(1, 16, (40, 4)) * (torch.randint(0, 2, (40, 4)) * 2 - 1)
    multiplier[0:16:2], multiplier[1:16:2] = 15, -15
    weight = CanonicalWeight({"qweight": q, "scale": multiplier.float() * torch.exp2(-torch.arange(40.0) % 5)[:, None]})
    found, packed = packed_of(weight, spec)
    assert packed[1].dtype == torch.int8
    dense = q.double() * weight.scale.double().repeat_interleave(64, 1)
    codes = torch.randint(-128, 128, (19, 256), dtype=torch.int8)
    codes[0], codes[1] = -128, 127
    y = found.forms["linear_q"](codes, torch.ones(19, 1), None, packed, None, spec, torch.float32)
    assert torch.equal(y, (codes.double() @ dense.t()).float())


@every_isa
def test_rows_threads_and_lists(short: str) -> None:
    specs = [spec_of(short, 200, 256, 32), spec_of(short, 33, 256, 64), spec_of(short, 64, 256, 128, scales="amax")]
    parts = [packed_of(quantize_weight(torch.randn(s.out_features, 256), s), s)[1] for s in specs]
    found, flat, none = kernel(specs[0].kernel), [tensor for part in parts for tensor in part], [None] * 3
    x = torch.randn(70, 256)
    codes = (*quantize_symmetric(x), None)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append([*found.forms["linear_list"](x, flat, none, specs),
                            *found.forms["linear_q_list"](*codes, flat, none, specs, torch.float32)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for i, (spec, part) in enumerate(zip(specs, parts, strict=True)):
        assert torch.equal(results[0][i], results[0][i + 3])
        for first, last in ((0, 1), (5, 8), (3, 9), (17, 70)):
            assert torch.equal(found.forms["linear"](x[first:last], part, None, spec), results[0][i][first:last])


@every_isa
@pytest.mark.parametrize("symmetric", [True, False], ids=["xsym", "xasym"])
def test_one_scale_for_all_tokens_may_be_expanded(short: str, symmetric: bool) -> None:
    spec = spec_of(short, 40, 128, 32, symmetric=symmetric)
    found, packed = packed_of(quantize_weight(torch.randn(40, 128), spec), spec)
    codes = torch.randint(-127, 128, (2, 9, 128), dtype=torch.int8)
    scale, zero_point = torch.tensor(0.02), None if symmetric else torch.tensor(-7.0)
    wide = None if zero_point is None else zero_point.expand(2, 9, 1)
    copied = None if zero_point is None else torch.full((2, 9, 1), -7.0)
    y = found.forms["linear_q"](codes, scale.expand(2, 9, 1), wide, packed, None, spec, torch.float32)
    assert torch.equal(y, found.forms["linear_q"](codes, torch.full((2, 9, 1), 0.02), copied, packed, None, spec,
                                                  torch.float32))


def test_wrong_arguments_are_named() -> None:
    spec = spec_of(HERE[0], 40, 128, 32)
    _, (qweight, scale) = packed_of(quantize_weight(torch.randn(40, 128), spec), spec)
    index = native.ISA_INDEX[x86.ISAS[HERE[0]][0]]
    x, zero = torch.randn(2, 128), torch.zeros(4, 4, 16, dtype=torch.int8)
    for s, zero_point, bits, activation, says in (
            (scale, None, 4, 0, "integer scales need rounded activations"),
            (scale, zero, 4, 1, "integer scales go with symmetric 4-bit weights"),
            (scale, None, 8, 1, "integer scales go with symmetric 4-bit weights"),
            (scale[:2].contiguous(), None, 4, 1, "scale has the wrong size"),
            (scale[:, :6].contiguous(), None, 4, 1, "integer scales go with symmetric 4-bit weights"),
            (scale[:, :5].contiguous(), None, 4, 1, "groups must divide K"),
            (scale[:, :8].contiguous(), None, 4, 1, "groups must divide K")):
        with pytest.raises(RuntimeError, match=says):
            torch.ops.qpass_x86.linear.default(x, qweight, s, zero_point, None, None, 40, 128, bits, activation, index)
