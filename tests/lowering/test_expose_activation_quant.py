"""expose_activation_quant: the quantization stands in plain ATen, and means what it did inside the op."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from qpass.lowering.debug import graph_text
from qpass.lowering.expose_activation_quant import expose_activation_quant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a8_channel"])
def test_equals_the_whole_op_bit_for_bit(make_quantized, trace, scheme, dtype):
    layer = make_quantized(nn.Linear(48, 8, dtype=dtype), scheme)
    traced = trace(layer, torch.randn(3, 5, 48, dtype=dtype))
    expected = traced.run()
    assert expose_activation_quant(traced.graph) == 1
    assert torch.equal(traced.run(), expected)
    with torch.no_grad():
        assert torch.equal(layer(traced.inputs[0]), expected)


def test_counts_of_ops(attention, trace):
    traced = trace(attention, torch.randn(2, 3, 32))
    assert (traced.count("qpass.linear"), traced.count("aten.amax")) == (4, 0)
    assert expose_activation_quant(traced.graph) == 4
    assert (traced.count("qpass.linear"), traced.count("qpass.linear_q"), traced.count("aten.amax")) == (0, 4, 4)


def test_weight_only_layers_are_left_whole(make_quantized, trace):
    traced = trace(make_quantized(nn.Linear(32, 8), "w4a16"), torch.randn(2, 32))
    assert expose_activation_quant(traced.graph) == 0
    assert traced.count("qpass.linear") == 1


def test_sizes_stay_symbolic(make_quantized, trace):
    rows, columns = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("columns", min=2, max=64)
    layer = make_quantized(nn.Linear(32, 8))
    traced = trace(layer, torch.randn(3, 5, 32), dynamic=({0: rows, 1: columns},))
    expose_activation_quant(traced.graph)
    codes = next(n for n in traced.graph.nodes if n.meta["val"].dtype == torch.int8 and n.op == "call_function")
    assert not any(isinstance(size, int) for size in codes.meta["val"].shape[:2])
    x = torch.randn(7, 11, 32)
    with torch.no_grad():
        assert torch.equal(traced.run(x), layer(x))


def test_golden(make_quantized, trace):
    traced = trace(make_quantized(nn.Linear(32, 8, dtype=torch.bfloat16)), torch.randn(2, 32, dtype=torch.bfloat16))
    expose_activation_quant(traced.graph)
    assert_expected_inline(graph_text(traced.graph), """\
def graph(p_bias, b_packed_qweight, b_packed_scale, x):
    # p_bias: bfloat16[8]
    # b_packed_qweight: int8[8, 32]
    # b_packed_scale: bfloat16[8, 2]
    # x: bfloat16[2, 32]
    convert_element_type_default: "float32[2, 32]" = torch.ops.prims.convert_element_type.default(x, torch.float32)
    abs_default: "float32[2, 32]" = torch.ops.aten.abs.default(convert_element_type_default)
    amax_default: "float32[2, 1]" = torch.ops.aten.amax.default(abs_default, [-1], True)
    clamp_min_default: "float32[2, 1]" = torch.ops.aten.clamp_min.default(amax_default, 1e-10)
    x_scale: "float32[2, 1]" = torch.ops.aten.div.Tensor(clamp_min_default, 127)
    div_tensor: "float32[2, 32]" = torch.ops.aten.div.Tensor(convert_element_type_default, x_scale)
    round_default: "float32[2, 32]" = torch.ops.aten.round.default(div_tensor)
    clamp_min_default_1: "float32[2, 32]" = torch.ops.aten.clamp_min.default(round_default, -127)
    clamp_max_default: "float32[2, 32]" = torch.ops.aten.clamp_max.default(clamp_min_default_1, 127)
    ne_tensor: "bool[2, 32]" = torch.ops.aten.ne.Tensor(clamp_max_default, clamp_max_default)
    scalar_tensor_default: "float32[]" = torch.ops.aten.scalar_tensor.default(
        0, dtype=torch.float32, layout=torch.strided, device=torch.device(type='cpu'),
    )
    where_self: "float32[2, 32]" = torch.ops.aten.where.self(ne_tensor, scalar_tensor_default, clamp_max_default)
    xq: "int8[2, 32]" = torch.ops.prims.convert_element_type.default(where_self, torch.int8)
    linear_q: "bfloat16[2, 8]" = torch.ops.qpass.linear_q.default(
        xq, x_scale, None, [b_packed_qweight, b_packed_scale], p_bias,
        'w4a8 int4:g16:sym x int8:token:sym 8x32 @linear_reference', torch.bfloat16,
    )
    return (linear_q,)
""")


def test_golden_asymmetric(make_quantized, trace):
    traced = trace(make_quantized(nn.Linear(32, 8, bias=False), "w4a8_channel"), torch.randn(2, 32))
    expose_activation_quant(traced.graph)
    assert_expected_inline(graph_text(traced.graph), """\
def graph(b_packed_qweight, b_packed_scale, x):
    # b_packed_qweight: int8[8, 32]
    # b_packed_scale: float32[8, 1]
    # x: float32[2, 32]
    amin_default: "float32[2, 1]" = torch.ops.aten.amin.default(x, [-1], True)
    clamp_max_default: "float32[2, 1]" = torch.ops.aten.clamp_max.default(amin_default, 0)
    amax_default: "float32[2, 1]" = torch.ops.aten.amax.default(x, [-1], True)
    clamp_min_default: "float32[2, 1]" = torch.ops.aten.clamp_min.default(amax_default, 0)
    sub_tensor: "float32[2, 1]" = torch.ops.aten.sub.Tensor(clamp_min_default, clamp_max_default)
    clamp_min_default_1: "float32[2, 1]" = torch.ops.aten.clamp_min.default(sub_tensor, 1e-10)
    x_scale: "float32[2, 1]" = torch.ops.aten.div.Tensor(clamp_min_default_1, 255)
    div_tensor: "float32[2, 1]" = torch.ops.aten.div.Tensor(clamp_max_default, x_scale)
    round_default: "float32[2, 1]" = torch.ops.aten.round.default(div_tensor)
    x_zero_point: "float32[2, 1]" = torch.ops.aten.sub.Tensor(-128, round_default)
    div_tensor_1: "float32[2, 32]" = torch.ops.aten.div.Tensor(x, x_scale)
    round_default_1: "float32[2, 32]" = torch.ops.aten.round.default(div_tensor_1)
    add_tensor: "float32[2, 32]" = torch.ops.aten.add.Tensor(round_default_1, x_zero_point)
    clamp_min_default_2: "float32[2, 32]" = torch.ops.aten.clamp_min.default(add_tensor, -128)
    clamp_max_default_1: "float32[2, 32]" = torch.ops.aten.clamp_max.default(clamp_min_default_2, 127)
    ne_tensor: "bool[2, 32]" = torch.ops.aten.ne.Tensor(clamp_max_default_1, clamp_max_default_1)
    scalar_tensor_default: "float32[]" = torch.ops.aten.scalar_tensor.default(
        0, dtype=torch.float32, layout=torch.strided, device=torch.device(type='cpu'),
    )
    where_self: "float32[2, 32]" = torch.ops.aten.where.self(ne_tensor, scalar_tensor_default, clamp_max_default_1)
    xq: "int8[2, 32]" = torch.ops.prims.convert_element_type.default(where_self, torch.int8)
    linear_q: "float32[2, 8]" = torch.ops.qpass.linear_q.default(
        xq, x_scale, x_zero_point, [b_packed_qweight, b_packed_scale], None,
        'w4a8 int4:channel:sym x int8:token:asym 8x32 @linear_reference', torch.float32,
    )
    return (linear_q,)
""")
