"""Weights that are decoded: every number format that a kernel of csrc/decoded.h takes, beside float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qpass.kernels.dispatch  # noqa: F401
from qpass.kernels import isa
from qpass.kernels.cpu import native, x86_decoded
from qpass.kernels.cpu.x86_codes import FAMILIES
from qpass.kernels.registry import LinearCall, choose, kernel
from qpass.scheme import PRESETS, RowCodec, WeightArgs, codec_of, family_of
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight, quantize_weight

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=native.refuses() or "")
HERE = [short for short, (name, _) in x86_decoded.ISAS.items() if name in isa.machine_has()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}


@dataclass(frozen=True)
class Format:
    """Numbers of a weight, and a K that its groups divide beside one that leaves a tail where that is allowed."""

    weight: WeightArgs
    inputs: tuple[int, ...]


def _grouped(kind: str, bits: int, size: int, **more: Any) -> WeightArgs:
    return WeightArgs(bits=bits, type=kind, granularity="per_group", group_size=size, **more)


FORMATS = {
    "fp8-tensor": Format(WeightArgs(bits=8, type="fp8", granularity="per_tensor"), (77, 192)),
    "fp8-channel": Format(WeightArgs(bits=8, type="fp8"), (1, 200)),
    "fp8-g32": Format(_grouped("fp8", 8, 32), (96, 136)),
    "fp8-b128": Format(WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=128), (128, 300)),
    "fp8-b16": Format(WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=16), (50,)),
    "mxfp8": Format(_grouped("mxfp8", 8, 32), (32, 96)),
    "mxfp6_e3m2": Format(_grouped("mxfp6_e3m2", 6, 32), (96,)),
    "mxfp6_e2m3": Format(_grouped("mxfp6_e2m3", 6, 32), (96,)),
    "mxfp4": Format(_grouped("mxfp4", 4, 32), (32, 160)),
    "nvfp4": Format(_grouped("nvfp4", 4, 16), (16, 112)), "nvfp4_mul": Format(_grouped("nvfp4_mul", 4, 16), (112,)),
    "nvfp4_reciprocal": Format(_grouped("nvfp4_reciprocal", 4, 16), (112,)),
    "int8_absmax": Format(WeightArgs(bits=8, type="int8_absmax"), (77, 192)),
    "nf4-64": Format(_grouped("nf4", 4, 64), (64, 192)), "fp4-128": Format(_grouped("fp4", 4, 128), (128,)),
    **{f"{kind}{bits}-g{size}": Format(_grouped(kind, bits, size, symmetric=False), (size, 3 * size))
       for kind, bits, size in (("affine", 4, 32), ("affine", 5, 32), ("affine", 8, 128), ("affine", 2, 16),
                                ("affine_signed", 4, 64), ("affine_signed", 3, 32), ("affine_zero", 4, 64),
                                ("affine_zero", 1, 64), ("affine_zero", 8, 32))},
    **{f"int{bits}-g16{'' if symmetric else '-asym'}": Format(_grouped("int", bits, 16, symmetric=symmetric), (16, 80))
       for bits in (2, 3, 4, 5, 6, 8) for symmetric in (True, False)},
}
every_format = pytest.mark.parametrize("name", list(FORMATS))
every_isa = pytest.mark.parametrize("short", HERE)


def spec_of(weight: WeightArgs, n: int, k: int, short: str) -> LinearSpec:
    return LinearSpec(family=family_of(weight, None), weight=weight, activation=None, out_features=n, in_features=k,
                      kernel=f"linear_decode_{short}")


def rounded(spec: LinearSpec, scale_dtype: torch.dtype = torch.float32, seed: int = 0) -> CanonicalWeight:
    weight = torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    weight[0] *= 1e-6  # subnormal codes where a scale serves several rows
    weight[-1] = 0 if len(weight) > 2 else weight[-1]
    return quantize_weight(weight, spec, scale_dtype)


def packed_for(weight: CanonicalWeight, spec: LinearSpec) -> list[Tensor]:
    layout = kernel(spec.kernel).layout
    packed = layout.pack(weight, spec)
    assert tuple(packed) == layout.names(spec)
    return [packed[name] for name in layout.names(spec)]


def forms(spec: LinearSpec) -> dict[str, Any]:
    return kernel(spec.kernel).forms


def assert_close(y: Tensor, x: Tensor, weight: CanonicalWeight, bias: Tensor | None, spec: LinearSpec,
                 context: object) -> None:
    w = dequantize_weight(weight, spec).double()
    exact, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    if not spec.weight.symmetric:  # q * scale and the offset are summed apart, and either may be large where w is small
        scale = weight.scale.double().abs().repeat_interleave(spec.group_size, 1)
        size = size + x.double().abs() @ (scale * (1 << spec.weight.bits - 1)).t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert y.dtype == x.dtype and y.shape == exact.shape
    allowed = HALF_ULP[x.dtype] * exact.abs() + 1e-6 * size + 2.0**-24
    assert bool(((y.double() - exact).abs() <= allowed).all()), (str(spec), context)


@every_isa
@every_format
def test_equals_float64(name: str, short: str) -> None:
    found = FORMATS[name]
    for i, (n, m) in enumerate(((1, 1), (31, 2), (48, 3), (70, 4), (33, 5), (17, 34))):
        spec = spec_of(found.weight, n, found.inputs[i % len(found.inputs)], short)
        scale_dtype, dtype = DTYPES[i % 3], DTYPES[i % 2]
        weight = rounded(spec, scale_dtype, seed=i)
        x, bias = torch.randn(m, spec.in_features).to(dtype), torch.randn(n).to(DTYPES[(i + 1) % 3]) if i % 2 else None
        y = forms(spec)["linear"](x, packed_for(weight, spec), bias, spec)
        assert_close(y, x, weight, bias, spec, m)


@every_isa
@every_format
def test_unpacks_to_the_same_bits(name: str, short: str) -> None:
    sizes = FORMATS[name].inputs
    for n, k, scale_dtype in ((1, sizes[0], torch.float16), (45, sizes[-1], torch.bfloat16)):
        spec = spec_of(FORMATS[name].weight, n, k, short)
        weight = rounded(spec, scale_dtype)
        back = kernel(spec.kernel).layout.unpack(kernel(spec.kernel).layout.pack(weight, spec), spec)
        assert set(back.tensors) == set(weight.tensors)
        for key, tensor in weight.tensors.items():
            other = back.tensors[key]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), key
            assert torch.equal(other.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


@every_isa
@every_format
def test_a_row_does_not_depend_on_the_others(name: str, short: str) -> None:
    spec = spec_of(FORMATS[name].weight, 50, FORMATS[name].inputs[-1], short)
    packed, x = packed_for(rounded(spec), spec), torch.randn(150, spec.in_features)
    whole = forms(spec)["linear"](x, packed, None, spec)
    for first, last in ((0, 1), (0, 2), (5, 8), (3, 7), (3, 9), (17, 34), (70, 150), (149, 150)):
        assert torch.equal(forms(spec)["linear"](x[first:last], packed, None, spec), whole[first:last]), (first, last)


@every_isa
def test_lists_equal_single_calls(short: str) -> None:
    specs = [spec_of(FORMATS[name].weight, n, 256, short) for name, n in (
        ("mxfp4", 40), ("nf4-64", 17), ("fp8-b128", 64), ("affine_zero4-g64", 33), ("int3-g16-asym", 5), ("nvfp4", 32))]
    parts = [packed_for(rounded(spec, seed=i), spec) for i, spec in enumerate(specs)]
    bias = [torch.randn(s.out_features).bfloat16() if i % 2 else None for i, s in enumerate(specs)]
    for m in (1, 6):
        x = torch.randn(2, m, 256).bfloat16()
        several = forms(specs[0])["linear_list"](x, [t for part in parts for t in part], bias, specs)
        single = [forms(s)["linear"](x, p, b, s) for s, p, b in zip(specs, parts, bias, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(several, single, strict=True))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_every_code_of_fp8(short: str, dtype: torch.dtype) -> None:
    spec = spec_of(WeightArgs(bits=8, type="fp8"), 256, 16, short)
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    weight = CanonicalWeight({"weight": codes.view(dtype), "scale": torch.full((256, 1), -0.5)})
    packed = packed_for(weight, spec)
    layout = kernel(spec.kernel).layout
    back = layout.unpack(dict(zip(layout.names(spec), packed, strict=True)), spec)
    assert torch.equal(back.tensors["weight"].view(torch.uint8), codes)
    for m in (1, 2, 6):
        x = torch.zeros(m, 16)
        x[:, 3] = 2.0  # one product: the value itself, but for Inf and NaN, which meet zeros
        y = forms(spec)["linear"](x, packed, None, spec)
        want = -codes[:, 0].view(dtype).float()
        want = torch.where(want.isfinite(), want, float("nan")).expand(m, 256)
        assert torch.equal(y.nan_to_num(12345.0), want.nan_to_num(12345.0)), m


@every_isa
def test_infinite_codes_and_scales_that_are_no_numbers(short: str) -> None:
    spec = spec_of(WeightArgs(bits=8, type="fp8"), 3, 16, short)
    codes = torch.ones(3, 16).to(torch.float8_e5m2)
    codes[0, 5] = float("inf")
    codes[1, 5] = -float("inf")
    weight = CanonicalWeight({"weight": codes, "scale": torch.ones(3, 1)})
    y = forms(spec)["linear"](torch.ones(1, 16), packed_for(weight, spec), None, spec)
    assert y.tolist() == [[float("inf"), -float("inf"), 16.0]]
    mx = spec_of(FORMATS["mxfp4"].weight, 4, 64, short)
    made = quantize_weight(torch.randn(4, 64), mx)
    made.tensors["scale"][:, :] = torch.tensor([[255, 120], [0, 0], [1, 200], [127, 127]], dtype=torch.uint8)
    x = torch.randn(2, 64)
    y = forms(mx)["linear"](x, packed_for(made, mx), None, mx)
    assert bool(y[:, 0].isnan().all()) and bool(y[:, 1:].isfinite().all())
    assert_close(y[:, 1:], x, CanonicalWeight({k: t[1:] for k, t in made.tensors.items()}),
                 None, replace(mx, out_features=3), "scales")


@every_isa
def test_any_table_and_zero_and_negative_scales(short: str) -> None:
    spec = spec_of(FORMATS["nf4-64"].weight, 37, 128, short)
    weight = rounded(spec)
    weight.tensors["code"] = torch.randn(16) * torch.logspace(-3, 3, 16)
    weight.tensors["absmax"][::3] = 0
    weight.tensors["absmax"][1::3] *= -1
    for m in (1, 3, 9):
        x = torch.randn(m, 128)
        assert_close(forms(spec)["linear"](x, packed_for(weight, spec), None, spec), x, weight, None, spec, m)


@every_isa
def test_equal_weights_of_a_group_are_exact(short: str) -> None:
    for bits in (4, 8):
        spec = spec_of(_grouped("affine", bits, 32, symmetric=False), 8, 64, short)
        weight = quantize_weight(torch.full((8, 64), 0.25), spec)
        x = torch.randn(5, 64)
        y = forms(spec)["linear"](x, packed_for(weight, spec), None, spec)
        assert torch.allclose(y, 0.25 * x.sum(1, keepdim=True).expand(5, 8), atol=1e-6)
        weight.tensors["offset"].zero_()
        assert not forms(spec)["linear"](x, packed_for(weight, spec), None, spec).any()


@every_isa
def test_shapes_and_not_finite_inputs(short: str) -> None:
    spec = spec_of(FORMATS["affine4-g32"].weight, 21, 96, short)
    weight = rounded(spec)
    packed, base = packed_for(weight, spec), torch.randn(2, 5, 96)
    for x in (base, base[:, 1:4], torch.randn(96, 6).t(), torch.randn(4, 192)[:, ::2], base[0, 0]):
        assert_close(forms(spec)["linear"](x, packed, None, spec), x, weight, None, spec, x.shape)
    assert forms(spec)["linear"](torch.randn(2, 0, 96), packed, None, spec).shape == (2, 0, 21)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 96)
        x[1, 50] = bad
        y = forms(spec)["linear"](x, packed, None, spec)
        assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


@every_isa
def test_a_graph_calls_the_native_op(short: str) -> None:
    specs = [spec_of(FORMATS[name].weight, n, 64, short) for name, n in (("mxfp4", 9), ("nvfp4", 33))]
    parts, x = [packed_for(rounded(spec), spec) for spec in specs], torch.randn(2, 3, 64)
    native_call = kernel(specs[0].kernel).native_call
    assert native_call is not None and native_call("linear_q", (x, parts[0], None, str(specs[0]))) is None
    single = native_call("linear", (x, parts[0], None, str(specs[0])))
    several = native_call("linear_list", (x, parts[0] + parts[1], [None, None], [str(spec) for spec in specs]))
    assert single is not None and several is not None
    want = [forms(spec)["linear"](x, part, None, spec) for spec, part in zip(specs, parts, strict=True)]
    assert torch.equal(single[0](*single[1]), want[0])
    assert torch.equal(several[0](*several[1]), torch.cat(want, -1))
    torch.library.opcheck(single[0], single[1], test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(several[0], several[1], test_utils="test_faketensor")


def _wrong(packed: list[Tensor], **changes: Any) -> tuple[Any, ...]:
    given = {"x": torch.randn(2, 64), "tensors": packed, "n": 40, "has": 4, "k": 64, "group_size": 32, "isa": 0}
    given |= changes
    return tuple(given.values())


def test_the_op_checks_what_it_is_given() -> None:
    spec = spec_of(FORMATS["mxfp4"].weight, 40, 64, "plain")
    packed = packed_for(rounded(spec), spec)
    codes, scale, table = packed
    op = torch.ops.qpass_x86.decoded.default
    assert op(*_wrong(packed)).shape == (2, 40)
    for changes, said in (({"n": 20}, "qweight has the wrong size"), ({"group_size": 16}, "scale has the wrong size"),
                          ({"group_size": 24}, "multiples of 16"), ({"isa": 99}, "instruction set"),
                          ({"tensors": [codes, scale, table[:8]]}, "16 floats"), ({"has": 99}, "out of range"),
                          ({"tensors": [codes, scale]}, "another number of tensors"), ({"n": 0}, "must be positive"),
                          ({"tensors": [codes.short(), scale, table]}, "codes must be"), ({"n": 1 << 50}, "too small"),
                          ({"tensors": [codes, scale, table.double()]}, "wrong dtype"),
                          ({"tensors": [codes[:-1], scale, table]}, "wrong size")):
        with pytest.raises(RuntimeError, match=said):
            op(*_wrong(packed, **changes))


def test_every_format_that_comes_with_qpass_is_chosen_where_its_activation_is_float() -> None:
    kept = {preset.name for preset in PRESETS.values() if preset.activation is None and isinstance(
        codec_of(preset.weight), RowCodec)}
    assert {"mxfp4a16", "nvfp4a16", "nf4", "fp4", "mxfp8a16", "mxfp6a16"} <= kept
    for name in kept:
        weight = PRESETS[name].weight
        assert family_of(weight, None) in FAMILIES, name
        spec = replace(spec_of(weight, 64, 256, "plain"), kernel="")
        call = LinearCall(spec=spec, device=torch.device("cpu"), dtype=torch.bfloat16)
        assert choose(call).kernel.name == f"linear_decode_{HERE[0]}", name


def test_refusals_are_sentences() -> None:
    found = kernel("linear_decode_plain")
    call = LinearCall(spec=spec_of(FORMATS["nf4-64"].weight, 8, 100, "plain"), device=torch.device("cpu"),
                      dtype=torch.float32)
    assert found.refuses(call) == "needs blocks of 64 that do not cross rows of 100"
    odd = replace(call, spec=spec_of(_grouped("int", 4, 24), 8, 96, "plain"))
    assert found.refuses(odd) == "needs group_size % 16 == 0, got 24"
    assert "float64" in (found.refuses(replace(call, dtype=torch.float64)) or "")
