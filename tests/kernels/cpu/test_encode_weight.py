"""Native encoding of weights gives what codec and layout give in plain torch, bit for bit, for each type it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.codecs.codebook import FP4, NF4
from qpass.kernels.cpu import native, native_weights
from qpass.kernels.cpu.x86_decoded import X86_DECODED
from qpass.kernels.layout import NonFinite
from qpass.scheme import WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight
from tests.kernels.cpu.test_quantize_weight import DTYPES, adversarial

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=str(native.refuses()))


def args(kind: str, bits: int, group: int | None = None, granularity: str = "", *, symmetric: bool = True
         ) -> WeightArgs:
    chosen: str = granularity or ("per_group" if group else "per_channel")
    return WeightArgs(bits=bits, type=kind, group_size=group, granularity=chosen,  # type: ignore[arg-type]
                      symmetric=symmetric)


CASES = {
    "fp8 tensor": args("fp8", 8, granularity="per_tensor"), "fp8 channel": args("fp8", 8),
    "fp8 groups": args("fp8", 8, 48), "fp8 blocks": args("fp8", 8, 32, "per_block"), "mxfp8": args("mxfp8", 8, 32),
    "mxfp6": args("mxfp6_e2m3", 6, 32), "mxfp4": args("mxfp4", 4, 32), "nvfp4": args("nvfp4", 4, 16),
    "nf4": args("nf4", 4, 64), "fp4": args("fp4", 4, 64), "int3": args("int", 3, 64), "int6": args("int", 6),
    "int2 asym": args("int", 2, 16, symmetric=False), "int7 asym": args("int", 7, symmetric=False),
}
BOOKS = {"nf4": NF4, "fp4": FP4}


def spec_of(numbers: WeightArgs, n: int, k: int) -> LinearSpec:
    return LinearSpec(family="test", weight=numbers, activation=None, out_features=n, in_features=k)


def same(weight: Tensor, numbers: WeightArgs) -> None:
    assert X86_DECODED.quantize is not None
    spec = spec_of(numbers, *weight.shape)
    got = X86_DECODED.quantize(weight, spec, None)
    want = X86_DECODED.pack(quantize_weight(weight, spec), spec)
    assert got is not None and set(got) == set(want) == set(X86_DECODED.names(spec))
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        differ = got[name].view(torch.uint8) != tensor.view(torch.uint8)
        assert not bool(differ.any()), f"{name}: {int(differ.sum())} of {differ.numel()} bytes differ"


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("int")])
def test_floats_wait_for_no_part_but_their_own(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert X86_DECODED.quantize is not None and X86_DECODED.largest is not None
    monkeypatch.setattr(native, "_loaded", {})
    weight = torch.randn(32, 192)
    assert X86_DECODED.largest(weight) == weight.abs().max()
    assert X86_DECODED.quantize(weight, spec_of(CASES[case], 32, 192), None, None) is not None
    assert set(native._loaded) == {"decoded"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_codec_and_layout_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    numbers = CASES[case]
    zeros = torch.zeros(3, 64, dtype=dtype)
    for weight in (adversarial(41, 192, dtype), (torch.randn(33, 64) * 0.02).to(dtype), zeros):
        same(weight, numbers)
    if numbers.group_size is None or case.startswith("fp8"):
        same(torch.randn(17, 77).to(dtype), numbers)


@pytest.mark.parametrize("case", CASES)
def test_every_float_that_16_bits_hold(case: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
        same(every.view(512, 128), CASES[case])  # neighbours side by side
        same(every[torch.randperm(1 << 16)].view(512, 128), CASES[case])


@pytest.mark.parametrize("case", ["fp8 channel", "mxfp8", "mxfp6", "mxfp4", "nvfp4"])
def test_quotients_at_and_next_to_ties(case: str) -> None:
    """Middles between the values of a format, of weights with a scale of 1 and of one that is no power of two."""
    numbers = CASES[case]
    bytes_ = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    value = bytes_.clamp(max={"mxfp6": 7.5, "mxfp4": 6, "nvfp4": 6}.get(case, 448))
    middle = (value[1:] + value[:-1]) / 2
    near = torch.stack((middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9))))
    flat = torch.cat((near.flatten(), -near.flatten(), value, value[:9]))[:512].view(-1, 64)
    flat[:, ::16] = value[-1]  # so that each group's scale is that of the format itself
    for scale in (1.0, 0.75, 3.1e-3):
        same(flat * scale, numbers)
        same((flat * scale).bfloat16(), numbers)


@pytest.mark.parametrize("case", ["nf4", "fp4"])
def test_codebooks_at_and_next_to_ties(case: str) -> None:
    """Many of these have another code if they are divided by their group's largest, not multiplied by 1 / it."""
    value = torch.tensor(BOOKS[case]).sort().values
    middle = (value[1:] + value[:-1]) / 2
    near = (middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), value, torch.ones(3))
    for scale in (torch.rand(64, 1), torch.rand(64, 1) * 1e37, torch.rand(64, 1) * 2e-38, torch.rand(64, 1).bfloat16()):
        same(torch.cat(near) * scale, CASES[case])
        same((torch.cat(near) * scale).bfloat16(), CASES[case])


@pytest.mark.parametrize("case", ["fp8 groups", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "nf4", "int3", "int2 asym"])
def test_rows_of_many_groups(case: str) -> None:
    """Scales are made for 8 groups at a time, and those that are left over one by one; NaN in one of them or none."""
    for dtype in DTYPES:
        weight = adversarial(18, 1216, dtype)  # 19 groups of 64, and no whole number of eights of any size
        weight[9:, ::97] *= 1e-3
        same(weight, CASES[case])


def test_every_quotient_of_fp8() -> None:
    """All significands of bfloat16 divided by all, over the exponents that e4m3 has and those just outside."""
    fraction = torch.arange(128, 256).bfloat16()
    exponent = torch.arange(-13, 8).exp2()[:, None] / 128
    weight = (fraction * exponent).flatten().bfloat16().repeat(128, 1)
    weight[:, 1::2] *= -1
    scale = (fraction / 128).float()[:, None]
    packed = native_weights.encode_pack(weight, weight.shape[1], "e4m3", "given", scale)
    spec = spec_of(CASES["fp8 channel"], *weight.shape)
    back = X86_DECODED.unpack({**packed, "gain": torch.ones(128)}, spec).tensors["weight"]
    want = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(back.view(torch.uint8), want.view(torch.uint8))
    weight[:, 7] = 3e4  # far above what the scale was made for
    packed = native_weights.encode_pack(weight, weight.shape[1], "e4m3", "given", scale)
    back = X86_DECODED.unpack({**packed, "gain": torch.ones(128)}, spec).tensors["weight"]
    want[:, 7] = 448
    assert torch.equal(back.view(torch.uint8), want.view(torch.uint8))


def test_written_into_tensors_that_are_there() -> None:
    for numbers in CASES.values():
        spec = spec_of(numbers, 64, 192)
        assert X86_DECODED.quantize is not None
        held = X86_DECODED.quantize(torch.randn(64, 192), spec, None)
        assert held is not None
        before = {name: tensor.data_ptr() for name, tensor in held.items()}
        weight = torch.randn(64, 192)
        again = X86_DECODED.quantize(weight, spec, held)
        assert again is not None and again["qweight"].data_ptr() == before["qweight"]
        assert again["scale"].data_ptr() == before["scale"]
        back = X86_DECODED.unpack(again, spec)
        assert isinstance(back, CanonicalWeight)
        for name, tensor in quantize_weight(weight, spec).tensors.items():
            assert torch.equal(back.tensors[name].float(), tensor.float()), (numbers, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_weight_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    for numbers in CASES.values():
        spec, weight = spec_of(numbers, 70, 576), torch.randn(70, 576).to(dtype)
        assert X86_DECODED.quantize is not None
        assert X86_DECODED.quantize(weight, spec, None, None, True) is not None
        for wrong in ("nan", "-inf"):
            for place in ((0, 0), (33, 300), (69, 575)):
                broken = weight.clone()
                broken[place] = float(wrong)
                with pytest.raises(NonFinite):
                    X86_DECODED.quantize(broken, spec, None, weight.abs().amax().float(), True)
                if place[0]:
                    continue
                same(broken, numbers)


@pytest.mark.parametrize("shape", [(300, 300), (128, 128), (1, 129), (257, 1040), (20, 100)], ids=str)
def test_blocks_of_128(shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        weight = torch.randn(shape).to(dtype)
        weight[:, 128:] = 0
        same(weight, args("fp8", 8, 128, "per_block"))


def test_what_is_not_taken() -> None:
    quantize = X86_DECODED.quantize
    assert quantize is not None
    assert quantize(torch.randn(64, 32).t(), spec_of(CASES["mxfp4"], 32, 64), None) is None
    assert quantize(torch.randn(32, 64).double(), spec_of(CASES["mxfp4"], 32, 64), None) is None
    assert quantize(torch.randn(32, 64), spec_of(args("mxfp6_e3m2", 6, 32), 32, 64), None) is None
    assert quantize(torch.randn(32, 80), spec_of(CASES["nf4"], 32, 80), None) is None


def test_sizes_are_checked() -> None:
    w, given = torch.randn(4, 64), torch.ones(1)
    packed, scale = torch.empty(32 * 32, dtype=torch.uint8), torch.empty(32 * 2, dtype=torch.uint8)

    def call(nbytes: int = 1024, group: int = 32, element: int = 0, rule: int = 0, count: int = 0, size: int = 1024,
             scales: int = 64, dtype: int = 0) -> str:
        code = native.library("decoded").qp_encode_pack(
            w.data_ptr(), dtype, nbytes, 4, 64, group, element, rule, given.data_ptr(), count, packed.data_ptr(), size,
            scale.data_ptr(), scales, None, 1)
        return "" if code == 0 else native.library("decoded").qp_last_error().decode()

    assert call() == ""
    assert "N * K" in call(nbytes=1000) and "1 to K" in call(group=65) and "unknown numbers" in call(element=3)
    assert "were given" in call(count=1) and "were given" in call(rule=1) and "packed weight" in call(size=1000)
    assert "scale has" in call(scales=60) and "float32" in call(dtype=3) and "unknown numbers" in call(rule=6)
    assert torch.equal(native_weights.amax(w, 32), w.abs().view(4, 2, 32).amax(-1))
