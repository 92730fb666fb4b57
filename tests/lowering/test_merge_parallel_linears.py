"""merge_parallel_linears: products of one tensor become one call with several weights."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from qpass.lowering.debug import graph_text
from qpass.lowering.expose_activation_quant import expose_activation_quant
from qpass.lowering.merge_parallel_linears import merge_parallel_linears
from qpass.lowering.share_activation_quant import share_activation_quant


def merged(traced):
    expose_activation_quant(traced.graph)
    share_activation_quant(traced.graph)
    return merge_parallel_linears(traced.graph)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "w4a8_channel"])
def test_equals_the_graph_before(quantize_layers, trace, scheme):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 8), nn.Linear(32, 24, bias=False), nn.Linear(32, 5)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x)

    traced = trace(quantize_layers(Three(), scheme), torch.randn(2, 3, 32))
    expected = traced.run()
    assert merged(traced) == 3
    for got, want in zip(traced.run(), expected, strict=True):
        assert torch.equal(got, want)


def test_counts_of_ops(attention, trace):
    traced = trace(attention, torch.randn(2, 3, 32))
    assert merged(traced) == 3
    assert (traced.count("qpass.linear_q"), traced.count("qpass.linear_q_list")) == (1, 1)
    assert merge_parallel_linears(traced.graph) == 0


def test_different_kernels_and_inputs_stay_apart(make_quantized, trace):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = make_quantized(nn.Linear(32, 32)), make_quantized(nn.Linear(32, 8))

        def forward(self, x):
            return self.b(self.a(x))

    traced = trace(Chain(), torch.randn(2, 32))
    assert merged(traced) == 0


def test_a_bias_computed_later_stays_apart(make_quantized, trace):
    """The second product's bias is made from the first product: it cannot be given to a call that stands before."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (make_quantized(nn.Linear(32, 8, bias=False)) for _ in range(2))

        def forward(self, x):
            return self.b.multiply(x, self.a(x)[0])

    traced = trace(Late(), torch.randn(2, 32))
    expected = traced.run()
    assert merged(traced) == 0
    assert torch.equal(traced.run(), expected)


def test_golden(attention, trace):
    traced = trace(attention, torch.randn(2, 32))
    merged(traced)
    assert_expected_inline(graph_text(traced.graph), """\
def graph(
    p_k_bias, b_k_packed_qweight, b_k_packed_scale, b_q_packed_qweight, b_q_packed_scale, b_v_packed_qweight,
    b_v_packed_scale, b_o_packed_qweight, b_o_packed_scale, x,
):
    # p_k_bias: float32[32]
    # b_k_packed_qweight: int8[32, 32]
    # b_k_packed_scale: float32[32, 2]
    # b_q_packed_qweight: int8[32, 32]
    # b_q_packed_scale: float32[32, 2]
    # b_v_packed_qweight: int8[32, 32]
    # b_v_packed_scale: float32[32, 2]
    # b_o_packed_qweight: int8[16, 32]
    # b_o_packed_scale: float32[16, 2]
    # x: float32[2, 32]
    abs_default: "float32[2, 32]" = torch.ops.aten.abs.default(x)
    amax_default: "float32[2, 1]" = torch.ops.aten.amax.default(abs_default, [-1], True)
    clamp_min_default: "float32[2, 1]" = torch.ops.aten.clamp_min.default(amax_default, 1e-10)
    x_scale: "float32[2, 1]" = torch.ops.aten.div.Tensor(clamp_min_default, 127)
    div_tensor: "float32[2, 32]" = torch.ops.aten.div.Tensor(x, x_scale)
    round_default: "float32[2, 32]" = torch.ops.aten.round.default(div_tensor)
    clamp_min_default_1: "float32[2, 32]" = torch.ops.aten.clamp_min.default(round_default, -127)
    clamp_max_default: "float32[2, 32]" = torch.ops.aten.clamp_max.default(clamp_min_default_1, 127)
    ne_tensor: "bool[2, 32]" = torch.ops.aten.ne.Tensor(clamp_max_default, clamp_max_default)
    scalar_tensor_default: "float32[]" = torch.ops.aten.scalar_tensor.default(
        0, dtype=torch.float32, layout=torch.strided, device=torch.device(type='cpu'),
    )
    where_self: "float32[2, 32]" = torch.ops.aten.where.self(ne_tensor, scalar_tensor_default, clamp_max_default)
    xq: "int8[2, 32]" = torch.ops.prims.convert_element_type.default(where_self, torch.int8)
    linear_q_list: "(float32[2, 32], float32[2, 32], float32[2, 32])" = torch.ops.qpass.linear_q_list.default(
        xq, x_scale, None,
        [
            b_q_packed_qweight,
            b_q_packed_scale,
            b_k_packed_qweight,
            b_k_packed_scale,
            b_v_packed_qweight,
            b_v_packed_scale,
        ],
        [None, p_k_bias, None],
        [
            'w4a8 int4:g16:sym x int8:token:sym 32x32 @linear_reference',
            'w4a8 int4:g16:sym x int8:token:sym 32x32 @linear_reference',
            'w4a8 int4:g16:sym x int8:token:sym 32x32 @linear_reference',
        ],
        torch.float32,
    )
    y: "float32[2, 32]" = operator.getitem(linear_q_list, 0)
    y_1: "float32[2, 32]" = operator.getitem(linear_q_list, 1)
    y_2: "float32[2, 32]" = operator.getitem(linear_q_list, 2)
    mul: "float32[2, 32]" = torch.ops.aten.mul.Tensor(y_1, y_2)
    add: "float32[2, 32]" = torch.ops.aten.add.Tensor(y, mul)
    abs_default_3: "float32[2, 32]" = torch.ops.aten.abs.default(add)
    amax_default_3: "float32[2, 1]" = torch.ops.aten.amax.default(abs_default_3, [-1], True)
    clamp_min_default_6: "float32[2, 1]" = torch.ops.aten.clamp_min.default(amax_default_3, 1e-10)
    x_scale_3: "float32[2, 1]" = torch.ops.aten.div.Tensor(clamp_min_default_6, 127)
    div_tensor_3: "float32[2, 32]" = torch.ops.aten.div.Tensor(add, x_scale_3)
    round_default_3: "float32[2, 32]" = torch.ops.aten.round.default(div_tensor_3)
    clamp_min_default_7: "float32[2, 32]" = torch.ops.aten.clamp_min.default(round_default_3, -127)
    clamp_max_default_3: "float32[2, 32]" = torch.ops.aten.clamp_max.default(clamp_min_default_7, 127)
    ne_tensor_3: "bool[2, 32]" = torch.ops.aten.ne.Tensor(clamp_max_default_3, clamp_max_default_3)
    scalar_tensor_default_3: "float32[]" = torch.ops.aten.scalar_tensor.default(
        0, dtype=torch.float32, layout=torch.strided, device=torch.device(type='cpu'),
    )
    where_self_3: "float32[2, 32]" = torch.ops.aten.where.self(
        ne_tensor_3, scalar_tensor_default_3, clamp_max_default_3,
    )
    xq_3: "int8[2, 32]" = torch.ops.prims.convert_element_type.default(where_self_3, torch.int8)
    linear_q_3: "float32[2, 16]" = torch.ops.qpass.linear_q.default(
        xq_3, x_scale_3, None, [b_o_packed_qweight, b_o_packed_scale], None,
        'w4a8 int4:g16:sym x int8:token:sym 16x32 @linear_reference', torch.float32,
    )
    return (linear_q_3,)
""")
