"""share_activation_quant: one tensor is quantized once."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import nn

from qpass.lowering.debug import graph_text
from qpass.lowering.expose_activation_quant import expose_activation_quant
from qpass.lowering.share_activation_quant import share_activation_quant


def shared(traced):
    expose_activation_quant(traced.graph)
    return share_activation_quant(traced.graph)


def test_equals_the_graph_before(attention, trace):
    traced = trace(attention, torch.randn(2, 3, 32))
    expected = traced.run()
    assert shared(traced) == 2
    assert torch.equal(traced.run(), expected)


def test_counts_of_ops(attention, trace):
    traced = trace(attention, torch.randn(2, 3, 32))
    expose_activation_quant(traced.graph)
    assert traced.count("aten.amax") == 4
    share_activation_quant(traced.graph)
    assert (traced.count("aten.amax"), traced.count("qpass.linear_q")) == (2, 4)
    assert share_activation_quant(traced.graph) == 0


def test_symmetric_and_asymmetric_are_not_shared(make_quantized, trace):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = make_quantized(nn.Linear(32, 8)), make_quantized(nn.Linear(32, 8), "w4a8_channel")

        def forward(self, x):
            return self.a(x) + self.b(x)

    traced = trace(Mixed(), torch.randn(2, 32))
    assert shared(traced) == 0


class Views(nn.Module):
    """The same rows, once as [2, 3, 32] and once as [6, 32]; and other rows, [4, 48] of the same numbers."""

    def __init__(self, make_quantized):
        super().__init__()
        self.a, self.b = make_quantized(nn.Linear(32, 8)), make_quantized(nn.Linear(32, 8))
        self.other = make_quantized(nn.Linear(48, 8))

    def forward(self, x):
        return self.a(x), self.b(x.reshape(-1, 32)), self.other(x.reshape(-1, 48))


def test_views_that_keep_the_rows_share(make_quantized, trace):
    traced = trace(Views(make_quantized), torch.randn(2, 3, 32))
    expected = traced.run()
    assert shared(traced) == 1
    assert traced.count("aten.amax") == 2
    for got, want in zip(traced.run(), expected, strict=True):
        assert torch.equal(got, want)


def test_golden(make_quantized, trace):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (make_quantized(nn.Linear(32, 8, bias=False)) for _ in range(2))

        def forward(self, x):
            return self.a(x) + self.b(x)

    traced = trace(Two(), torch.randn(2, 32))
    shared(traced)
    assert_expected_inline(graph_text(traced.graph), """\
def graph(b_a_packed_qweight, b_a_packed_scale, b_b_packed_qweight, b_b_packed_scale, x):
    # b_a_packed_qweight: int8[8, 32]
    # b_a_packed_scale: float32[8, 2]
    # b_b_packed_qweight: int8[8, 32]
    # b_b_packed_scale: float32[8, 2]
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
    linear_q: "float32[2, 8]" = torch.ops.qpass.linear_q.default(
        xq, x_scale, None, [b_a_packed_qweight, b_a_packed_scale], None,
        'w4a8 int4:g16:sym x int8:token:sym 8x32 @linear_reference', torch.float32,
    )
    linear_q_1: "float32[2, 8]" = torch.ops.qpass.linear_q.default(
        xq, x_scale, None, [b_b_packed_qweight, b_b_packed_scale], None,
        'w4a8 int4:g16:sym x int8:token:sym 8x32 @linear_reference', torch.float32,
    )
    add: "float32[2, 8]" = torch.ops.aten.add.Tensor(linear_q, linear_q_1)
    return (add,)
""")
