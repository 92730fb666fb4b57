"""verify: a graph that cannot be right does not get through, and QPASS_CHECK=1 finds numbers that are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qpass.errors import LoweringError
from qpass.lowering import pipeline
from qpass.lowering.graph_nodes import LINEAR_Q, our_nodes
from qpass.lowering.pipeline import lower_graph
from qpass.lowering.verify import verify


def test_counts_our_ops_and_changes_nothing(attention, trace):
    traced = trace(attention, torch.randn(2, 32))
    assert lower_graph(traced.graph)["verify"] == 2  # q, k and v in one, and o
    before = str(traced.graph)
    verify(traced.graph)
    assert str(traced.graph) == before


def test_an_op_that_no_pass_handled_is_an_error(attention, trace):
    traced = trace(attention, torch.randn(2, 32))
    with pytest.raises(LoweringError, match="left unlowered"):
        verify(traced.graph)


def test_a_changed_shape_is_an_error(attention, trace):
    traced = trace(attention, torch.randn(2, 32))

    def shorten(graph):
        for node, product in our_nodes(graph):
            if node.target is LINEAR_Q:
                wrong = product.specs[0].replace("16x32", "15x32")
                node.args = tuple(wrong if a == product.specs[0] else a for a in node.args)
        return 1

    pipeline.register_pass("shorten", shorten)
    with pytest.raises(LoweringError, match=r"pass verify: .*gives float32\[2, 15\], but .* float32\[2, 16\]"):
        lower_graph(traced.graph)


def test_replacing_by_another_dtype_is_an_error(attention, trace):
    traced = trace(attention, torch.randn(2, 32))

    def widen(graph):
        from qpass.lowering.graph_nodes import add_call, replace

        for node, _ in our_nodes(graph):
            with graph.inserting_before(node):
                args = (*node.args[:-1], torch.float64)
                replace(node, add_call(graph, node.target, args, like=node))
        return 1

    pipeline.register_pass("widen", widen, before="merge_parallel_linears")
    with pytest.raises(LoweringError, match=r"pass widen: replacing linear_q.* from float32.* to float64"):
        lower_graph(traced.graph)


@pytest.mark.parametrize("times", [1.0, 1.02])
def test_check_compares_native_ops_with_the_reference(add_kernel, make_quantized, trace, monkeypatch, times):
    monkeypatch.setenv("QPASS_CHECK", "1")
    add_kernel("linear_test_native", times)
    layer = nn.Sequential(make_quantized(nn.Linear(32, 8), "w4a8", "linear_test_native"))
    traced = trace(layer, torch.randn(4, 32))
    expected = traced.run() * times
    lower_graph(traced.graph)
    assert traced.count("qpass.check_linear") == 1
    if times == 1.0:
        assert torch.equal(traced.run(), expected)
    else:
        with pytest.raises(LoweringError, match="linear_test_native differs from the reference at '0'"):
            traced.run()


@pytest.mark.parametrize("times", [1.0, 1.02])
def test_check_takes_one_tensor_of_several_weights_apart(add_kernel, attention, quantize_layers, trace, monkeypatch,
                                                         times):
    monkeypatch.setenv("QPASS_CHECK", "1")
    add_kernel("linear_test_native", times, joined=True)
    traced = trace(quantize_layers(type(attention)(), "w4a8", "linear_test_native"), torch.randn(4, 32))
    expected = traced.run()
    lower_graph(traced.graph)
    assert traced.count("qpass_lowering_test.linear_q_list") == 1 and traced.count("qpass.check_linear") == 2
    if times == 1.0:
        assert torch.equal(traced.run(), expected)
    else:
        with pytest.raises(LoweringError, match="linear_test_native differs from the reference at 'q'"):
            traced.run()


def test_check_covers_merged_and_weight_only_layers(attention, quantize_layers, trace, monkeypatch):
    monkeypatch.setenv("QPASS_CHECK", "1")
    for model in (attention, quantize_layers(type(attention)(), "w4a16")):
        traced = trace(model, torch.randn(2, 3, 32))
        expected = traced.run()
        lower_graph(traced.graph)
        assert traced.count("qpass.check_linear") == 2
        assert torch.equal(traced.run(), expected)


def test_check_finds_a_wrong_quantization(attention, trace, monkeypatch):
    monkeypatch.setenv("QPASS_CHECK", "1")
    traced = trace(attention, torch.randn(2, 32))
    lower_graph(traced.graph)
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.div.Tensor and node.args[1] == 127:
            node.args = (node.args[0], 100)
    with pytest.raises(LoweringError, match="activation quantization written out before 'q' differs"):
        traced.run()
