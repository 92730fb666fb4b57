"""Compiled models: torch.compile, backend="qpass", changing shapes, caches, checks, regional compile, export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from qpass.errors import LoweringError
from qpass.lowering import record, record_store
from qpass.lowering.backend import qpass_backend
from qpass.lowering.install import install, is_installed


class Small(nn.Module):
    """Two products of one tensor that is computed just before."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(32))
        self.a, self.b = nn.Linear(32, 16, bias=False), nn.Linear(32, 16)

    def forward(self, x):
        h = x * self.scale
        return self.a(h) * self.b(h)


@pytest.fixture
def small(quantize_layers):
    return quantize_layers(Small())


def frames(model, shapes, backend="inductor"):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    results = []
    with torch.no_grad():
        for shape in shapes:
            results.append(compiled(torch.ones(*shape, 32)))
    return counter.frame_count, results


def test_no_recompiles_beyond_the_float_models(small, installed):
    shapes = [(1, 5), (2, 7), (3, 9), (4, 1)]
    quantized, results = frames(small, shapes)
    assert quantized == frames(Small().eval(), shapes, "eager")[0]  # the fewest that any backend needs
    with torch.no_grad():
        for shape, got in zip(shapes, results, strict=True):
            torch.testing.assert_close(got, small(torch.ones(*shape, 32)))


def test_a_cached_compile_is_still_explained(small, installed, empty_compile_cache):
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        cold = torch.compile(small, fullgraph=True)(x)
        told = record.for_site("a").activation
        torch._dynamo.reset()
        record.forget()
        assert record.for_site("a") is None
        counters.clear()
        warm = torch.compile(small, fullgraph=True)(x)
        assert counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"] >= 1
        assert torch.equal(cold, warm)
        again = record.for_site("a")
        assert told == "fused into mul"
        assert again.activation == f"{told} (from the compile cache)"
        assert again.merged_with == ("b",)
        assert again.passes["share_activation_quant"] == 1
        assert record.for_site("b").activation == "shared with a (from the compile cache)"
        assert record.for_site("absent") is None


def test_models_of_the_same_names_are_told_apart(quantize_layers, installed, empty_compile_cache):
    eight, weight_only = quantize_layers(Small()), quantize_layers(Small(), "w4a16")
    specs = [str(model.a.spec) for model in (eight, weight_only)]
    told = ["fused into mul", "alone: the scheme leaves the activation in float"]
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        for model in (eight, weight_only):
            torch.compile(model)(x)
        assert [record.for_site("a", spec).activation for spec in specs] == told
        record.forget()
        torch._dynamo.reset()
        for model in (eight, weight_only):
            torch.compile(model)(x)
        cached = [record.for_site("a", spec).activation for spec in specs]
    assert cached == [f"{text} (from the compile cache)" for text in told]
    assert record.for_site("a", str(eight.a.spec.on("absent"))) is None


def test_a_record_left_by_a_killed_compile_hides_no_whole_one(small, installed, empty_compile_cache):
    with torch.no_grad():
        torch.compile(small)(torch.randn(2, 3, 32))
        whole = record.for_site("a")
        record_store.write([replace(whole, activation=record._PENDING), replace(whole, site="unrelated")])
        torch._dynamo.reset()
        record.forget()
        torch.compile(small)(torch.randn(2, 3, 32))
        assert record.for_site("a").activation == "fused into mul (from the compile cache)"


def test_the_backend_needs_no_installation(small):
    assert not is_installed()
    x = torch.randn(4, 32)
    with torch.no_grad():
        result = torch.compile(small, backend=qpass_backend, options={"emulate_precision_casts": True})(x)
        torch.testing.assert_close(result, small(x))
    assert record.for_site("b").activation == "shared with a"
    assert not is_installed()
    install()
    assert "qpass" in torch._dynamo.list_backends()


def test_the_users_pass_still_runs_in_a_compile(small):
    seen = []
    with inductor_config.patch(post_grad_custom_pre_pass=seen.append):
        install()
        with torch.no_grad():
            torch.compile(small)(torch.randn(2, 32))
    assert len(seen) == 1
    assert record.for_site("a") is not None


def test_a_pass_set_later_that_takes_the_slot_is_told(small, installed, caplog):
    with inductor_config.patch(post_grad_custom_pre_pass=lambda graph: None), torch.no_grad():
        x = torch.randn(2, 32)
        torch.testing.assert_close(torch.compile(small)(x), small(x))
    assert "compiled without the lowering passes" in caplog.text


def test_regional_compile_speaks_for_every_layer(quantize_layers, installed):
    model = nn.Sequential(quantize_layers(Small()), nn.Linear(16, 32), quantize_layers(Small()))
    for index in (0, 2):
        model[index].compile(fullgraph=True)
    with torch.no_grad():
        model(torch.randn(3, 32))
    assert record.for_site("2.a").activation.startswith("fused into mul")
    assert record.for_site("2.b").activation == "shared with 2.a"
    assert record.for_site("0.b").activation == "shared with 0.a"


def test_why_a_quantization_stands_alone(make_quantized, add_kernel, installed):
    add_kernel("linear_test_whole", linear_q=False)

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make_quantized(nn.Linear(32, 32)), make_quantized(nn.Linear(32, 32))
            self.whole = make_quantized(nn.Linear(32, 8), "w4a8", "linear_test_whole")
            self.weight_only = make_quantized(nn.Linear(32, 8), "w4a16")

        def forward(self, x):
            x = self.second(self.first(x))
            return self.whole(x), self.weight_only(x)

    model, x = Several().eval(), torch.randn(2, 32)
    with torch.no_grad():
        for got, want in zip(torch.compile(model, fullgraph=True)(x), model(x), strict=True):
            torch.testing.assert_close(got, want)
    told = {name: record.for_site(name).activation for name in ("first", "second", "whole", "weight_only")}
    assert told == {
        "first": "alone: it reads an input of the compiled graph",
        "second": "alone: it reads the result of linear_q in first, which is written elsewhere",
        "whole": "alone: linear_test_whole takes only float activations and quantizes them itself",
        "weight_only": "alone: the scheme leaves the activation in float",
    }


def test_check_stops_a_wrong_kernel_in_a_compiled_model(make_quantized, add_kernel, installed, monkeypatch):
    monkeypatch.setenv("QPASS_CHECK", "1")
    add_kernel("linear_test_wrong", 1.05)
    model = nn.Sequential(nn.ReLU(), make_quantized(nn.Linear(32, 8), "w8a8", "linear_test_wrong"))
    with torch.no_grad(), pytest.raises(LoweringError, match="linear_test_wrong differs from the reference at '1'"):
        torch.compile(model)(torch.randn(2, 32))


def test_with_gradients_on(small, installed):
    """Without no_grad, parameters that want gradients make Inductor compile the training graph."""
    x = torch.randn(2, 32)
    torch.testing.assert_close(torch.compile(small)(x), small(x))
    assert record.for_site("b").activation == "shared with a"


def test_export_keeps_the_op(small):
    x = torch.randn(2, 32)
    with torch.no_grad():
        program = torch.export.export(small, (x,))
        torch.testing.assert_close(program.module()(x), small(x))
    assert sum("qpass.linear.default" in str(n.target) for n in program.graph.nodes) == 2
