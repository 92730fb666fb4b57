"""lower_attention: keys and values are read as they lie in the cache, by one op, whatever shared and masked them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from qpass.kernels.cpu import native
from qpass.kernels.isa import machine_refuses
from qpass.lowering import record
from qpass.lowering.debug import graph_text
from qpass.lowering.graph_nodes import LEFT
from qpass.lowering.lower_attention import lower_attention
from qpass.lowering.pipeline import disable_pass, lower_graph

if (refusal := machine_refuses("avx2") or native.refuses()):
    pytest.skip(f"no native attention here: {refusal}", allow_module_level=True)

sdpa = nn.functional.scaled_dot_product_attention
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
NATIVE = "qpass_x86.attention"


def repeat(x: Tensor, times: int) -> Tensor:
    b, heads, tokens, size = x.shape
    return x[:, :, None].expand(b, heads, times, tokens, size).reshape(b, heads * times, tokens, size)


class Cached(nn.Module):
    """A step of decoding over a static cache: one product for q, k and v, the cache written in place, attention."""

    def __init__(self, way: str, heads: int = 4, shared: int = 2, size: int = 16, places: int = 24) -> None:
        super().__init__()
        self.way, self.heads, self.shared, self.size = way, heads, shared, size
        self.qkv = nn.Linear(32, (heads + 2 * shared) * size, bias=False)
        self.o = nn.Linear(heads * size, 32, bias=False)
        self.register_buffer("keys", torch.zeros(2, shared, places, size))
        self.register_buffer("values", torch.zeros(2, shared, places, size))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        b, m, _ = x.shape
        heads = self.qkv(x).view(b, m, -1, self.size).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.shared, self.shared], 1)
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        k, v, options = self.keys, self.values, {}
        seen = torch.arange(k.shape[2]) <= at[:, None]
        if "gqa" in self.way:
            options["enable_gqa"] = True
        else:
            k, v = repeat(k, self.heads // self.shared), repeat(v, self.heads // self.shared)
        if "bool" in self.way:
            options["attn_mask"] = seen[None, None].expand(b, 1, m, -1)
        if "float" in self.way:
            options["attn_mask"] = torch.zeros(m, k.shape[2]).masked_fill(~seen, -1e9)
        if "causal" in self.way:
            k, v, options["is_causal"] = k[:, :, :m], v[:, :, :m], True
        y = sdpa(q, k, v, scale=0.3 if "scale" in self.way else None, **options)
        return self.o(y.transpose(1, 2).reshape(b, m, -1))  # type: ignore[no-any-return]


WAYS = ["bool", "bool gqa", "float", "float gqa scale", "causal gqa", "scale"]


@pytest.mark.parametrize("way", WAYS)
def test_counts_of_ops_and_equals_the_graph_before(quantize_layers: Any, trace: Any, way: str) -> None:
    model = quantize_layers(Cached(way))
    at = torch.arange(3) if "causal" in way else torch.tensor([5, 6, 7])
    traced = trace(model, torch.randn(2, 3, 32), at)
    expected = traced.run()
    copies = traced.count("aten.expand"), traced.count("aten.clone")
    assert traced.count(FLASH) == 1
    assert lower_attention(traced.graph) == 1
    assert (traced.count(FLASH), traced.count(NATIVE)) == (0, 1)
    assert traced.count("aten.where") == 0 or "float" in way  # a mask of bool is read as it is
    if "gqa" not in way:
        assert traced.count("aten.clone") <= copies[1] - 2 and traced.count("aten.expand") <= copies[0] - 2
    for got, want in zip(traced.run(), expected, strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert lower_attention(traced.graph) == 0


class Left(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        if self.way == "gradients":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        if self.way == "dropout":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5)[0]
        if self.way == "mask":  # one number for all keys of a row
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=q[..., :1])[0]
        return sdpa(q, k, v)


@pytest.mark.parametrize(("way", "size", "dtype", "told"), [
    ("gradients", 16, torch.float32, "its logarithms of sums are read"),
    ("dropout", 16, torch.float32, "drops out 0.5"),
    ("head size", 12, torch.float32, "heads of a multiple of 8"), ("dtype", 16, torch.float64, "takes one of float32"),
    ("mask", 16, torch.float32, "its mask is")])
def test_what_stays_says_why(trace: Any, way: str, size: int, dtype: torch.dtype, told: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, size, dtype=dtype) for _ in range(3))
    traced = trace(Left(way), q, k, v)
    assert lower_attention(traced.graph) == 0
    node, = [node for node in traced.graph.nodes if str(node.target).startswith(FLASH)]
    assert told in node.meta[LEFT]


def test_a_graph_without_quantized_layers_is_left_alone(trace: Any) -> None:
    traced = trace(Left(""), *(torch.randn(1, 2, 5, 16) for _ in range(3)))
    assert lower_graph(traced.graph) == {} and traced.count(FLASH) == 1


@pytest.mark.parametrize("way", ["bool", "causal gqa"])
def test_compiled(quantize_layers: Any, installed: None, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all lengths, nothing copied for the heads, checked against the reference on the way."""
    monkeypatch.setenv("QPASS_CHECK", "1")
    torch.manual_seed(0)
    model = quantize_layers(Cached(way))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    results = []
    for step in (compiled, model):
        model.keys.zero_()
        model.values.zero_()
        torch._dynamo.reset()
        torch.manual_seed(1)
        with torch.no_grad():
            ys = [step(torch.randn(2, m, 32), torch.arange(m) + (0 if "causal" in way else 4)) for m in (3, 6)]
        results.append([*ys, model.keys.clone()])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 0.02 * want.abs().max()
    assert record.for_site("o").passes["lower_attention"] == 1
    assert "attention" in record.for_site("o").activation


def test_generated_code_copies_nothing(quantize_layers: Any, installed: None) -> None:
    model = quantize_layers(Cached("bool"))
    x, at = torch.randn(2, 1, 32), torch.tensor([5])
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x, at)
        assert f"torch.ops.{NATIVE}.default(" in code and f"torch.ops.{FLASH}" not in code
        assert "empty_strided_cpu((2, 2, 2, 24, 16)" not in code and "empty_strided_cpu((2, 4, 24, 16)" not in code


def test_switched_off(quantize_layers: Any, trace: Any) -> None:
    traced = trace(quantize_layers(Cached("bool")), torch.randn(2, 1, 32), torch.tensor([5]))
    with disable_pass("lower_attention"):
        lower_graph(traced.graph)
    assert (traced.count(FLASH), traced.count(NATIVE)) == (1, 0)


def test_golden(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    native.prepare("attention")  # before, so that it is built with all that the machine has
    monkeypatch.setenv("QPASS_ISA", "avx2")
    class Step(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            return sdpa(q, repeat(k, 2), repeat(v, 2), attn_mask=seen, scale=1 / math.sqrt(16)).transpose(1, 2)

    traced = trace(Step(), torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16),
                   torch.rand(1, 1, 1, 9) < 0.5)
    lower_attention(traced.graph)
    assert_expected_inline(graph_text(traced.graph), """\
def graph(q, k, v, seen):
    # q: float32[1, 4, 1, 16]
    # k: float32[1, 2, 9, 16]
    # v: float32[1, 2, 9, 16]
    # seen: bool[1, 1, 1, 9]
    attention: "float32[1, 1, 4, 16]" = torch.ops.qpass_x86.attention.default(q, k, v, seen, False, 0.25, 1)
    permute_default: "float32[1, 4, 1, 16]" = torch.ops.aten.permute.default(attention, [0, 2, 1, 3])
    transpose: "float32[1, 1, 4, 16]" = torch.ops.aten.transpose.int(permute_default, 1, 2)
    return (transpose,)
""")
