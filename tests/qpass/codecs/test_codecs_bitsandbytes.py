"""Codecs against bitsandbytes: its codes, scales and numbers, bit for bit, out of a file, and fresh if it is there.

`bitsandbytes_numbers.py` made the file.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qpass.formats.bitsandbytes_format import _read_four_bits
from qpass.scheme import RowCodec, WeightArgs, codec_of
from qpass.spec import LinearSpec
from tests.qpass.codecs.bitsandbytes_numbers import BLOCKS, FILE, KINDS, theirs, values, weights

cases = pytest.mark.parametrize("kind", KINDS)
blocks = pytest.mark.parametrize("block", BLOCKS)
STORED = load_file(FILE)
NAMES = [name.removesuffix("/weight") for name in STORED if name.endswith("/weight")]


def spec_of(kind: str, block: int, weight: Tensor) -> LinearSpec:
    args = WeightArgs(bits=4, type=kind, granularity="per_group", group_size=block)
    return LinearSpec(family="test", weight=args, activation=None, out_features=weight.shape[0],
                      in_features=weight.shape[1])


def compare(weight: Tensor, kind: str, block: int, tool: Callable[[str], Tensor]) -> None:
    """What the codec makes of a weight, and of what the tool made of it, with the tool's."""
    codec, spec = codec_of(spec_of(kind, block, weight).weight), spec_of(kind, block, weight)
    assert isinstance(codec, RowCodec)
    made = codec.encode(weight.float(), spec.weight, torch.float32)
    for name in codec.names:
        same = made[name].view(torch.uint8) == tool(name).view(torch.uint8)
        assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} bytes differ"
    decoded = codec.decode(made, spec.weight, spec.shape, slice(0, spec.out_features))
    assert torch.equal(decoded, tool("decoded"))
    state = f"quant_state.bitsandbytes__{kind}"
    read = _read_four_bits({"weight": tool("packed"), "code": tool("code"), "absmax": tool("nested.absmax"),
                            "nested_absmax": tool("nested.nested_absmax"), "state": tool(f"nested.{state}"),
                            "nested_quant_map": tool("nested.nested_quant_map")}, spec)
    assert torch.equal(read.tensors["absmax"].view(torch.int32), tool("nested").view(torch.int32))


@cases
@blocks
@pytest.mark.parametrize("name", NAMES)
def test_stored_numbers_are_ours(name: str, kind: str, block: int) -> None:
    compare(STORED[f"{name}/weight"], kind, block, lambda short: STORED[f"{name}/{kind}/{block}/{short}"])


@cases
@pytest.mark.parametrize("block", [*BLOCKS, 128])
def test_fresh_numbers_are_ours(kind: str, block: int) -> None:
    pytest.importorskip("bitsandbytes")
    with torch.compiler.set_stance("force_eager"):  # it compiles what decodes odd shapes
        for weight in weights(values()).values():
            if weight.shape[1] % 16 or weight.shape[1] % block == 0:  # else it may decode with scales of other blocks
                made = theirs(weight, kind, block)
                compare(weight, kind, block, lambda short, made=made: made[short])  # type: ignore[misc]
