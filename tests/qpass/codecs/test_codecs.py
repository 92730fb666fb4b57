"""Codecs: there and back within the format's error, any rows alone as in the whole, and the tools' own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qpass.codecs.elements import E2M1, E2M3, E3M2, pack_sixes, to_codes, unpack_sixes, values
from qpass.errors import RecipeError
from qpass.scheme import RowCodec, WeightArgs, codec_of
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight, quantize_weight

CASES = {
    "fp8-tensor": WeightArgs(bits=8, type="fp8", granularity="per_tensor"),
    "fp8-channel": WeightArgs(bits=8, type="fp8"),
    "fp8-group": WeightArgs(bits=8, type="fp8", granularity="per_group", group_size=64),
    "fp8-block": WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=128),
    "mxfp8": WeightArgs(bits=8, type="mxfp8", granularity="per_group", group_size=32),
    "mxfp6-e3m2": WeightArgs(bits=6, type="mxfp6_e3m2", granularity="per_group", group_size=32),
    "mxfp6-e2m3": WeightArgs(bits=6, type="mxfp6_e2m3", granularity="per_group", group_size=32),
    "mxfp4": WeightArgs(bits=4, type="mxfp4", granularity="per_group", group_size=32),
    "nvfp4": WeightArgs(bits=4, type="nvfp4", granularity="per_group", group_size=16),
    "nvfp4-mul": WeightArgs(bits=4, type="nvfp4_mul", granularity="per_group", group_size=16),
    "nf4": WeightArgs(bits=4, type="nf4", granularity="per_group", group_size=64),
    "fp4": WeightArgs(bits=4, type="fp4", granularity="per_group", group_size=64),
    "affine4": WeightArgs(bits=4, type="affine", granularity="per_group", group_size=32, symmetric=False),
    "affine5": WeightArgs(bits=5, type="affine", granularity="per_group", group_size=32, symmetric=False),
    "affine-zero3": WeightArgs(bits=3, type="affine_zero", granularity="per_group", group_size=64, symmetric=False),
    "hqq-columns": WeightArgs(bits=4, type="hqq_columns", granularity="per_group", group_size=64, symmetric=False),
}
ERROR = {8: 0.03, 6: 0.07, 5: 0.05, 4: 0.14, 3: 0.2}  # relative to the weight, root mean square


def spec_of(args: WeightArgs, n: int, k: int) -> LinearSpec:
    return LinearSpec(family="test", weight=args, activation=None, out_features=n, in_features=k)


@pytest.mark.parametrize("args", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("n", [1, 37, 300])
def test_there_and_back(args: WeightArgs, n: int) -> None:
    spec = spec_of(args, n, 192)
    w = torch.randn(n, 192)
    packed = quantize_weight(w, spec)
    codec = codec_of(args)
    assert isinstance(codec, RowCodec)
    assert tuple(packed.tensors) == codec.names
    codec.check(packed.tensors, args, spec.shape)
    back = dequantize_weight(packed, spec)
    assert (back - w).pow(2).mean().sqrt() < ERROR[args.bits] * w.pow(2).mean().sqrt()
    middle = codec.decode(packed.tensors, args, spec.shape, slice(n // 3, n))
    assert torch.equal(middle, back[n // 3:])
    assert LinearSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("args", CASES.values(), ids=CASES.keys())
def test_zeros_stay_zero_and_outliers_stay_finite(args: WeightArgs) -> None:
    spec = spec_of(args, 8, 192)
    w = torch.zeros(8, 192)
    assert dequantize_weight(quantize_weight(w, spec), spec).abs().max() == 0
    w[3, 5], w[4, 6] = 3e4, -1e-30
    back = dequantize_weight(quantize_weight(w, spec), spec)
    assert back.isfinite().all() and (back[3, 5] - 3e4).abs() < 3e4 * 0.15


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_blocks_may_run_across_rows(name: str) -> None:
    args = WeightArgs(bits=4, type=name, granularity="per_group", group_size=64)
    spec = spec_of(args, 7, 33)
    w = torch.randn(7, 33)
    packed = quantize_weight(w, spec)
    flat = torch.stack([packed.tensors["packed"] >> 4, packed.tensors["packed"] & 15], -1).view(-1)[:7 * 33]
    expected = packed.tensors["code"][flat.int()] * packed.tensors["absmax"].repeat_interleave(64)[:7 * 33]
    assert torch.equal(dequantize_weight(packed, spec), expected.view(7, 33))
    codec = codec_of(args)
    assert isinstance(codec, RowCodec)
    assert torch.equal(codec.decode(packed.tensors, args, (7, 33), slice(3, 5)), expected.view(7, 33)[3:5])


@pytest.mark.parametrize("args", CASES.values(), ids=CASES.keys())
def test_a_wrong_tensor_is_named(args: WeightArgs) -> None:
    codec = codec_of(args)
    assert isinstance(codec, RowCodec)
    spec = spec_of(args, 16, 192)
    tensors = quantize_weight(torch.randn(16, 192), spec).tensors
    for name in tensors:
        with pytest.raises(ValueError, match="weight"):
            codec.check({**tensors, name: tensors[name][:0]}, args, spec.shape)


@pytest.mark.parametrize("element", [E2M1, E3M2, E2M3], ids=["e2m1", "e3m2", "e2m3"])
def test_elements_round_to_nearest_even(element: tuple[int, int]) -> None:
    table = values(element, torch.device("cpu"))
    assert torch.equal(to_codes(table, element), torch.arange(len(table), dtype=torch.uint8))
    positive = table[:len(table) // 2]
    middle = (positive[1:] + positive[:-1]) / 2
    codes = to_codes(middle, element)
    below = torch.arange(len(middle))
    assert (codes % 2 == 0).all() and ((codes == below) | (codes == below + 1)).all()
    assert to_codes(torch.tensor([1e9, -1e9]), element).tolist() == [len(positive) - 1, len(table) - 1]


def test_sixes_are_a_stream_from_the_low_end() -> None:
    codes = torch.randint(0, 64, (3, 32), dtype=torch.uint8)
    packed = pack_sixes(codes)
    stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(3, 32, 6)
    assert ((stream << np.arange(6)).sum(-1) == codes.numpy()).all()
    assert torch.equal(unpack_sixes(packed), codes)


def test_read_only_types_say_so() -> None:
    args = WeightArgs(bits=2, type="q2_k", granularity="per_group", group_size=256)
    with pytest.raises(RecipeError, match="q2_k is read from GGUF"):
        quantize_weight(torch.randn(4, 256), spec_of(args, 4, 256))


def test_bitsandbytes_tables() -> None:
    from qpass.codecs.codebook import FP4, NF4

    assert sorted(NF4) == list(NF4) and len(set(NF4)) == 16
    assert [abs(v) for v in FP4[:8]] == [abs(v) for v in FP4[8:]]
