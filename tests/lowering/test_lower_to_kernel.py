"""lower_to_kernel: what the registry gives for a node stands in its place; where it gives none, the op says so."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from qpass.lowering.debug import graph_text
from qpass.lowering.expose_activation_quant import expose_activation_quant
from qpass.lowering.graph_nodes import LEFT, our_nodes, product_of
from qpass.lowering.lower_to_kernel import lower_to_kernel
from qpass.lowering.merge_parallel_linears import merge_parallel_linears
from qpass.lowering.share_activation_quant import share_activation_quant


def test_equals_the_graph_before_and_counts_ops(add_kernel, make_quantized, trace):
    add_kernel("linear_test_native")
    traced = trace(make_quantized(nn.Linear(32, 8), "w4a8", "linear_test_native"), torch.randn(2, 3, 32))
    expected = traced.run()
    expose_activation_quant(traced.graph)
    assert lower_to_kernel(traced.graph) == 1
    assert (traced.count("qpass.linear_q"), traced.count("qpass_lowering_test.linear_q")) == (0, 1)
    assert torch.equal(traced.run(), expected)


def test_the_native_op_still_answers_for_its_arguments(add_kernel, make_quantized, trace):
    add_kernel("linear_test_native")
    traced = trace(make_quantized(nn.Linear(32, 8), "w4a8", "linear_test_native"), torch.randn(2, 32))
    expose_activation_quant(traced.graph)
    lower_to_kernel(traced.graph)
    node = next(n for n in traced.graph.nodes if "qpass_lowering_test" in str(n.target))
    product = product_of(node)
    assert product is not None
    assert (product.spec.out_features, product.dtype, product.x.name) == (8, torch.float32, "xq")


def test_a_kernel_without_native_op_stays_and_says_why(make_quantized, trace):
    traced = trace(make_quantized(nn.Linear(32, 8), "w4a16"), torch.randn(2, 32))
    assert lower_to_kernel(traced.graph) == 0
    (node, _), = our_nodes(traced.graph)
    assert node.meta[LEFT] == ("linear_reference has no native op for linear; it is called through "
                               "torch.ops.qpass.linear")


class TwoOfOne(nn.Module):
    """Two products of one tensor, of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(32, 8, bias=False), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.v(x), self.k(x)], -1)


def test_one_tensor_for_several_weights_is_read_in_slices(add_kernel, quantize_layers, trace):
    add_kernel("linear_test_native", joined=True)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    layers = quantize_layers(TwoOfOne(), "w4a8", "linear_test_native")
    traced = trace(layers, torch.randn(2, 5, 32), dynamic=({1: tokens},))
    expected = traced.run()
    for change in (expose_activation_quant, share_activation_quant, merge_parallel_linears):
        change(traced.graph)
    assert lower_to_kernel(traced.graph) == 1
    assert torch.equal(traced.run(), expected)


def test_golden_of_several_weights(add_kernel, quantize_layers, trace):
    add_kernel("linear_test_native", joined=True)
    traced = trace(quantize_layers(TwoOfOne(), "w4a8", "linear_test_native"), torch.randn(2, 32))
    for change in (expose_activation_quant, share_activation_quant, merge_parallel_linears, lower_to_kernel):
        change(traced.graph)
    after = graph_text(traced.graph).partition("torch.int8)\n")[2]
    assert_expected_inline(after, """\
    linear_q_list_1: "float32[2, 24]" = torch.ops.qpass_lowering_test.linear_q_list.default(
        xq, x_scale, None, [b_v_packed_qweight, b_v_packed_scale, b_k_packed_qweight, b_k_packed_scale],
        [p_v_bias, None],
        [
            'w4a8 int4:g16:sym x int8:token:sym 16x32 @linear_test_native',
            'w4a8 int4:g16:sym x int8:token:sym 8x32 @linear_test_native',
        ],
        torch.float32, 1.0,
    )
    y_2: "float32[2, 16]" = torch.ops.aten.slice.Tensor(linear_q_list_1, -1, 0, 16)
    y_3: "float32[2, 8]" = torch.ops.aten.slice.Tensor(linear_q_list_1, -1, 16, 24)
    cat: "float32[2, 24]" = torch.ops.aten.cat.default([y_2, y_3], -1)
    return (cat,)
""")


def test_golden(add_kernel, make_quantized, trace):
    add_kernel("linear_test_native")
    layer = make_quantized(nn.Linear(32, 8, bias=False), "w4a8", "linear_test_native")
    traced = trace(layer, torch.randn(2, 32))
    expose_activation_quant(traced.graph)
    lower_to_kernel(traced.graph)
    assert_expected_inline(graph_text(traced.graph).partition("torch.int8)\n")[2], """\
    linear_q_1: "float32[2, 8]" = torch.ops.qpass_lowering_test.linear_q.default(
        xq, x_scale, None, [b_packed_qweight, b_packed_scale], None,
        'w4a8 int4:g16:sym x int8:token:sym 8x32 @linear_test_native', torch.float32, 1.0,
    )
    return (linear_q_1,)
""")
