"""The pipeline: its order, passes of one's own, switching off, replacing, errors that name the pass, debug output."""

from __future__ import annotations

import ast

import pytest
import torch

import qpass
from qpass.errors import DuplicateRegistration, LoweringError, QPassError
from qpass.lowering import pipeline
from qpass.lowering.pipeline import disable_pass, enable_pass, lower_graph, passes, register_pass, replace_pass

BUILT_IN = ["expose_activation_quant", "share_activation_quant", "merge_parallel_linears", "lower_attention",
            "write_out_small_products", "lower_to_kernel", "verify"]


def names():
    return [p.name for p in passes()]


def test_the_whole_pipeline_equals_the_graph_before(attention, trace):
    traced = trace(attention, torch.randn(2, 3, 32))
    expected = traced.run()
    assert lower_graph(traced.graph) == {"expose_activation_quant": 4, "share_activation_quant": 2,
                                         "merge_parallel_linears": 3, "lower_attention": 0,
                                         "write_out_small_products": 0, "lower_to_kernel": 0, "verify": 2}
    assert torch.equal(traced.run(), expected)


def test_a_graph_without_our_ops_is_left_alone(trace):
    traced = trace(torch.nn.Linear(4, 4), torch.randn(2, 4))
    before = str(traced.graph)
    assert lower_graph(traced.graph) == {}
    assert str(traced.graph) == before


@pytest.mark.parametrize("where, index", [({}, 5), ({"before": "share_activation_quant"}, 1), ({"after": "verify"}, 7),
                                          ({"position": 0}, 0)])
def test_register_pass(where, index):
    assert names() == BUILT_IN
    qpass.register_pass("mine", lambda graph: 0, **where)
    assert names() == [*BUILT_IN[:index], "mine", *BUILT_IN[index:]]
    pipeline.unregister_pass("mine")
    assert names() == BUILT_IN


def test_a_registered_pass_runs_and_is_counted(attention, trace):
    @register_pass("count_nodes")
    def count_nodes(graph):
        return len(graph.nodes)

    assert lower_graph(trace(attention, torch.randn(2, 32)).graph)["count_nodes"] > 10


def test_register_pass_refuses():
    with pytest.raises(DuplicateRegistration, match="'verify' is registered already"):
        register_pass("verify", lambda graph: 0)
    with pytest.raises(QPassError, match="no pass is named 'absent'; the pipeline is expose_activation_quant ->"):
        register_pass("mine", lambda graph: 0, before="absent")
    with pytest.raises(QPassError, match="one of before, after and position"):
        register_pass("mine", lambda graph: 0, before="verify", position=1)
    with pytest.raises(QPassError, match="built in"):
        pipeline.unregister_pass("verify")
    assert names() == BUILT_IN


@pytest.mark.parametrize("off, expected", [
    ("expose_activation_quant", {"qpass.linear": 1, "qpass.linear_list": 1}),
    ("share_activation_quant", {"qpass.linear_q": 4}),
    ("merge_parallel_linears", {"qpass.linear_q": 4}),
    ("lower_to_kernel", {"qpass.linear_q": 1, "qpass.linear_q_list": 1}),
    ("verify", {"qpass.linear_q": 1, "qpass.linear_q_list": 1}),
])
def test_any_pass_can_be_off(attention, trace, off, expected):
    traced = trace(attention, torch.randn(2, 3, 32))
    want = traced.run()
    with disable_pass(off):
        assert off not in lower_graph(traced.graph)
    assert {name: traced.count(name) for name in expected} == expected
    assert torch.equal(traced.run(), want)
    assert all(p.enabled for p in passes())


def test_disable_and_enable_for_good():
    disable_pass("verify")
    assert [p.name for p in passes() if not p.enabled] == ["verify"]
    enable_pass("verify")
    assert all(p.enabled for p in passes())


def test_replace_pass(attention, trace):
    seen = []
    with replace_pass("merge_parallel_linears", lambda graph: seen.append(graph) or 0):
        traced = trace(attention, torch.randn(2, 32))
        assert lower_graph(traced.graph)["merge_parallel_linears"] == 0
    assert seen == [traced.graph]
    assert passes() == pipeline.PIPELINE


def test_a_pass_that_fails_is_named(attention, trace):
    register_pass("broken", lambda graph: 1 // 0)
    with pytest.raises(LoweringError, match=r"pass broken failed on a graph with k, o, q .*ZeroDivisionError"):
        lower_graph(trace(attention, torch.randn(2, 32)).graph)


def test_debug_lines(attention, trace, monkeypatch, capfd):
    graph = trace(attention, torch.randn(2, 32)).graph
    monkeypatch.setenv("QPASS_DEBUG", "1")
    lower_graph(graph)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == ("qpass: q: w4a8 int4:g16:sym x int8:token:sym 32x32, linear_reference, in one call with k, v")
    assert lines[3] == "qpass: o: w4a8 int4:g16:sym x int8:token:sym 16x32, linear_reference"
    assert len(lines) == 4
    monkeypatch.setenv("QPASS_DEBUG", "2")
    lower_graph(trace(attention, torch.randn(2, 32)).graph)
    text = capfd.readouterr().err
    assert "qpass: merge_parallel_linears: 3 changed in " in text
    assert "needs group_size % 32 == 0, got 16" in text or "needs " in text


def test_debug_dumps_are_numbered_python(attention, trace, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("QPASS_DEBUG", "3")
    monkeypatch.setenv("QPASS_DEBUG_DIR", str(tmp_path / "dumps"))
    for _ in range(2):
        lower_graph(trace(attention, torch.randn(2, 32)).graph)
    assert sorted(p.name for p in (tmp_path / "dumps").iterdir()) == ["graph_000", "graph_001"]
    folder = tmp_path / "dumps" / "graph_000"
    assert str(folder) in capfd.readouterr().err
    files = sorted(p.name for p in folder.iterdir())
    assert len(files) == 14
    assert files[2:4] == ["02.share_activation_quant.after.py", "02.share_activation_quant.before.py"]
    before, after = ((folder / name).read_text() for name in (files[3], files[2]))
    for text in (before, after):
        ast.parse(text)
    assert before.count("aten.amax") == 4
    assert after.count("aten.amax") == 2
