"""Experts under torch.compile: their activation's quantization is exposed, shared, fused, checked; routing is data."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import qpass
from qpass.errors import LoweringError
from qpass.kernels.registry import KERNELS, force_kernel, kernel, register_kernel
from qpass.layers.experts_layer import QuantExperts
from qpass.lowering import pipeline
from qpass.lowering.expose_activation_quant import expose_activation_quant
from qpass.lowering.install import install
from qpass.lowering.share_activation_quant import share_activation_quant
from tests.small_experts import Experts

E, H, N = 5, 64, 32


class Block(nn.Module):
    """A norm, a router, its experts and a shared expert, which all read the norm's result."""

    def __init__(self, top_k: int = 2, biased: bool = False) -> None:
        super().__init__()
        self.norm, self.gate, self.experts = nn.RMSNorm(H), nn.Linear(H, E, bias=False), Experts(E, H, N, biased=biased)
        self.shared_up, self.shared_down = nn.Linear(H, N, bias=False), nn.Linear(N, H, bias=False)
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        rows = h.view(-1, H)
        weight, index = self.gate(rows).softmax(-1).topk(self.top_k, -1)
        mixed = self.experts(rows, index, weight).view(x.shape)
        return x + mixed + self.shared_down(F.relu(self.shared_up(h)))


def block(scheme: str = "w8a8", kernel_name: str | None = None, *, top_k: int = 2, biased: bool = False) -> Block:
    torch.manual_seed(2)
    model = Block(top_k, biased).eval()
    recipe = qpass.Recipe(scheme, ignore=["gate"])
    if kernel_name is None:
        qpass.quantize(model, recipe, example_inputs=torch.randn(1, 4, H), progress=False)
    else:
        with force_kernel(kernel_name):
            qpass.quantize(model, recipe, example_inputs=torch.randn(1, 4, H), progress=False)
    assert isinstance(model.experts, QuantExperts)
    return model


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_channel"])
def test_passes_change_nothing_of_the_result(scheme, trace):
    """Both symmetries of the activation; the experts' codes are those of the shared expert."""
    traced = trace(block(scheme), torch.randn(2, 3, H))
    expected = traced.run()
    assert (traced.count("qpass.experts"), traced.count("qpass.linear")) == (1, 2)
    assert expose_activation_quant(traced.graph) == 3
    assert (traced.count("qpass.experts"), traced.count("qpass.experts_q")) == (0, 1)
    assert torch.equal(traced.run(), expected)
    rounds = traced.count("aten.round")
    assert share_activation_quant(traced.graph) == 1
    assert traced.count("aten.round") < rounds
    assert torch.equal(traced.run(), expected)


def test_weight_only_experts_stay_whole(trace):
    traced = trace(block("w8a16"), torch.randn(2, 3, H))
    assert expose_activation_quant(traced.graph) == 0 and traced.count("qpass.experts") == 1


@pytest.mark.parametrize("kernel_name", [None, "linear_reference"], ids=["native", "reference"])
def test_compiled_equals_eager_and_explain_tells_the_fusion(kernel_name, installed):
    model, x = block("w8a8", kernel_name), torch.randn(2, 3, H)
    with torch.no_grad(), inductor_config.patch(emulate_precision_casts=True):
        want = model(x)
        got = torch.compile(model, fullgraph=True)(x)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    rows = {row.name: row for row in qpass.explain(model).rows}
    told = {rows["experts.up"].activation, rows["shared_up.weight"].activation}
    assert told == {"fused into norm (RMSNorm)", "shared with experts"} or told == {
        "fused into norm (RMSNorm)", "shared with shared_up"}
    assert rows["experts.down"].activation == "in the kernel, between the two products"


def test_the_check_passes_and_finds_a_wrong_kernel(installed, monkeypatch):
    monkeypatch.setenv("QPASS_CHECK", "1")
    right, x = block(), torch.randn(2, 3, H)
    with torch.no_grad():
        assert torch.allclose(torch.compile(right)(x), right(x), rtol=1e-4, atol=1e-4)
    reference = kernel("experts_reference")

    @register_kernel(op="experts", scheme="*", device="*", priority=-1, linear="linear_reference", name="experts_wrong")
    def wrong(x, index, weight, packed, bias, spec):
        return reference.forms["experts"](x, index, weight, packed, bias, spec) * 1.1

    try:
        torch._dynamo.reset()
        broken = block("w8a8", "experts_wrong")
        with torch.no_grad(), pytest.raises(LoweringError, match=r"experts_wrong differs .* at 'experts'"):
            torch.compile(broken)(x)
    finally:
        del KERNELS["experts_wrong"]


def test_another_routing_or_batch_compiles_nothing_anew():
    install()
    counter = CompileCounterWithBackend("inductor")
    model = block()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Raw Sym")  # sizes that are not nodes of the graph
        for tokens in (4, 4, 9, 2):
            x = torch.randn(1, tokens, H) * 3
            assert torch.allclose(compiled(x), model(x), rtol=1e-3, atol=1e-2)
        one_sided = torch.randn(1, 1, H).expand(1, 6, H).contiguous()  # every token chooses the same experts
        assert torch.allclose(compiled(one_sided), model(one_sided), rtol=1e-3, atol=1e-2)
    assert counter.frame_count == 1


def test_experts_of_several_schemes_quantize_their_input_once(trace):
    torch.manual_seed(2)
    model = Block().eval()
    recipe = qpass.Recipe("w8a8", ignore=["gate"], overrides={"*.up[1]": "w4a8", "*.down[3]": None})
    qpass.quantize(model, recipe, example_inputs=torch.randn(1, 4, H), progress=False)
    blocks = len(model.experts.blocks)
    assert blocks == 3
    traced = trace(model, torch.randn(2, 3, H))
    assert expose_activation_quant(traced.graph) == blocks + 2
    assert share_activation_quant(traced.graph) >= blocks - 1


def test_without_the_pass_the_kernel_rounds(installed):
    model, x = block(), torch.randn(2, 3, H)
    with torch.no_grad(), pipeline.disable_pass("expose_activation_quant"):
        assert torch.allclose(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-4)
    row = next(row for row in qpass.explain(model).rows if row.name == "experts.up")
    assert row.activation == "alone: expose_activation_quant did not run, so the kernel quantizes"


class Direct(nn.Module):
    """A norm and experts with a routing that is given."""

    def __init__(self, model: Block) -> None:
        super().__init__()
        self.norm, self.experts = model.norm, model.experts

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.experts(self.norm(x), index, weight)


@pytest.mark.parametrize("kernel_name", [None, "linear_reference"], ids=["native", "reference"])
def test_codes_of_a_compiled_graph_are_those_of_eager(kernel_name, installed, rounds_as_eager):
    """Bit for bit where the compiler rounds as eager does; else a code may differ by one, which moves little."""
    model = Direct(block("w8a8", kernel_name).to(torch.bfloat16)).eval()
    x, index = torch.randn(7, H).bfloat16(), torch.randint(0, E + 1, (7, 2))
    weight = torch.rand(7, 2).bfloat16()
    with torch.no_grad():
        want = model(x, index, weight)
        with inductor_config.patch(emulate_precision_casts=True):
            same = torch.equal(torch.compile(model, fullgraph=True)(x, index, weight), want)
        assert same or not rounds_as_eager
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True)(x, index, weight)
    assert float((got - want).float().norm() / want.float().norm()) < 0.02
