"""Native experts: one tensor for weights that would be packed apart; no result depends on threads or other tokens."""

from __future__ import annotations

import pytest
import torch

import qpass.kernels.dispatch  # noqa: F401
from qpass.experts_spec import ExpertsSpec, Gate
from qpass.kernels.cpu import native
from qpass.kernels.experts_choice import choose_experts, pack_blocks, unpack_block
from qpass.kernels.registry import ExpertsCall, kernel, load_builtin
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import quantize_weight

load_builtin()
pytestmark = pytest.mark.skipif(native.refuses() is not None, reason="the native library does not run on this machine")


def part(n: int, k: int) -> LinearSpec:
    return LinearSpec(family="w4a8", weight=WeightArgs(bits=4, granularity="per_group", group_size=32),
                      activation=ActivationArgs(), out_features=n, in_features=k)


def test_an_expert_of_zeros_among_others() -> None:
    spec = part(48, 64).on("linear_w4a8_plain")
    weights = [quantize_weight(torch.randn(48, 64) * on, spec) for on in (0.0, 1.0, 0.0)]
    blocks = pack_blocks(weights, spec, 3)
    names = kernel(spec.kernel).layout.names(spec)
    for expert, weight in enumerate(weights):
        back = unpack_block([blocks[name] for name in names], spec, expert)
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in weight.tensors.items())


def test_neither_the_number_of_threads_nor_other_tokens_change_anything() -> None:
    spec = ExpertsSpec(experts=4, hidden=256, intermediate=96, gate=Gate(function="silu"), up=part(192, 256),
                       down=part(256, 96))
    chosen, _ = choose_experts(ExpertsCall(spec=spec, device=torch.device("cpu"), dtype=torch.bfloat16), prepare=True)
    if not chosen.kernel.startswith("experts_w4a8_"):
        pytest.skip(f"{chosen.kernel} runs here")
    packed = []
    for one in (chosen.up, chosen.down):
        assert one is not None
        shape = (one.out_features, one.in_features)
        blocks = pack_blocks([quantize_weight(torch.randn(shape), one) for _ in range(4)], one, 4)
        packed += [blocks[name] for name in kernel(one.kernel).layout.names(one)]
    x, index = torch.randn(33, 256).bfloat16(), torch.randint(0, 5, (33, 3))
    weight, before = torch.rand(33, 3), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.ops.qpass.experts(x, index, weight, packed, [None, None], str(chosen)))
        torch.set_num_threads(2)  # one token takes a way of its own, unless it chose an expert twice
        results.append(torch.cat([torch.ops.qpass.experts(x[i:i + 1], index[i:i + 1], weight[i:i + 1], packed,
                                                          [None, None], str(chosen)) for i in range(33)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
