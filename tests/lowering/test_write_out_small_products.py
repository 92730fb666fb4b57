"""write_out_small_products: a router's product becomes a loop, as exact as the call was; what is large stays a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from qpass.kernels.small_products import MOST_WORK
from qpass.lowering.debug import graph_text
from qpass.lowering.pipeline import disable_pass, lower_graph
from qpass.lowering.write_out_small_products import write_out_small_products


class Router(nn.Module):
    """Scores of experts, and a quantized layer beside them."""

    def __init__(self, experts: int = 8, dtype: torch.dtype = torch.bfloat16, way: str = "") -> None:
        super().__init__()
        self.way = way
        self.gate = nn.Parameter(torch.randn(experts, 64, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(experts, dtype=dtype))
        self.up = nn.Linear(64, 32, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.way == "bias":
            scores = torch.addmm(self.bias, x, self.gate.permute(1, 0))
        elif self.way == "scaled":
            scores = torch.addmm(self.bias, x, self.gate.permute(1, 0), beta=2)
        elif self.way == "columns":
            scores = torch.mm(x, self.gate.view(64, -1))
        elif self.way == "linear":
            scores = nn.functional.linear(x, self.gate)
        else:
            scores = torch.mm(x, self.gate.permute(1, 0))
        return scores, self.up(x)


@pytest.mark.parametrize("way", ["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_is_as_exact_as_one_rounding(quantize_layers: Any, trace: Any, way: str, dtype: torch.dtype, tokens: int
                                     ) -> None:
    model = quantize_layers(Router(dtype=dtype, way=way))
    traced = trace(model, torch.randn(tokens, 64, dtype=dtype))
    assert write_out_small_products(traced.graph) == 1
    assert traced.count("aten.mm") == traced.count("aten.addmm") == 0
    x = torch.randn(tokens, 64, dtype=dtype)
    scores, _ = traced.run(x)
    exact = x.double() @ model.gate.double().t() + (model.bias.double() if way else 0)
    near = 64 * torch.finfo(torch.float32).eps * (x.double().abs() @ model.gate.double().abs().t())
    assert scores.dtype == dtype
    assert ((scores - exact).abs() <= near + torch.finfo(dtype).eps / 2 * (exact.abs() + near)).all()
    assert write_out_small_products(traced.graph) == 0


@pytest.mark.parametrize(("tokens", "experts", "dtype", "way"), [
    (MOST_WORK // 64 // 8 + 1, 8, torch.bfloat16, ""), (2, 8, torch.float32, ""), (2, 8, torch.bfloat16, "scaled"),
    (2, 8, torch.bfloat16, "columns")])
def test_what_stays_one_call(quantize_layers: Any, trace: Any, tokens: int, experts: int, dtype: torch.dtype, way: str
                             ) -> None:
    traced = trace(quantize_layers(Router(experts, dtype, way)), torch.randn(tokens, 64, dtype=dtype))
    before = graph_text(traced.graph)
    assert write_out_small_products(traced.graph) == 0
    assert graph_text(traced.graph) == before


def test_any_number_of_tokens_stays_one_call(quantize_layers: Any, trace: Any) -> None:
    tokens = torch.export.Dim("tokens", min=1, max=64)
    traced = trace(quantize_layers(Router()), torch.randn(3, 64, dtype=torch.bfloat16), dynamic=({0: tokens},))
    assert write_out_small_products(traced.graph) == 0


def test_graphs_without_quantized_layers_and_the_switch(quantize_layers: Any, trace: Any) -> None:
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    plain = trace(Router(), x)
    assert lower_graph(plain.graph) == {} and plain.count("aten.mm") == 1
    traced = trace(quantize_layers(Router()), x)
    with disable_pass("write_out_small_products"):
        lower_graph(traced.graph)
    assert traced.count("aten.mm") == 1


def test_compiled_is_a_loop(quantize_layers: Any, installed: None) -> None:
    model = quantize_layers(Router(way="linear"))
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        (scores, _), (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert "extern_kernels.mm" not in code
        assert (scores - model(x)[0]).abs().max() <= torch.finfo(torch.bfloat16).eps * scores.abs().max()


def test_golden(trace: Any) -> None:
    traced = trace(Router(way="bias"), torch.randn(1, 64, dtype=torch.bfloat16))
    write_out_small_products(traced.graph)
    assert_expected_inline(graph_text(traced.graph), """\
def graph(p_gate, p_bias, p_up_weight, x):
    # p_gate: bfloat16[8, 64]
    # p_bias: bfloat16[8]
    # p_up_weight: bfloat16[32, 64]
    # x: bfloat16[1, 64]
    unsqueeze_default: "bfloat16[1, 1, 64]" = torch.ops.aten.unsqueeze.default(x, 1)
    convert_element_type_default: "float32[1, 1, 64]" = torch.ops.prims.convert_element_type.default(
        unsqueeze_default, torch.float32,
    )
    convert_element_type_default_1: "float32[8, 64]" = torch.ops.prims.convert_element_type.default(
        p_gate, torch.float32,
    )
    mul_tensor: "float32[1, 8, 64]" = torch.ops.aten.mul.Tensor(
        convert_element_type_default, convert_element_type_default_1,
    )
    sum_dim_int_list: "float32[1, 8]" = torch.ops.aten.sum.dim_IntList(mul_tensor, [-1])
    add_tensor: "float32[1, 8]" = torch.ops.aten.add.Tensor(sum_dim_int_list, p_bias)
    convert_element_type_default_2: "bfloat16[1, 8]" = torch.ops.prims.convert_element_type.default(
        add_tensor, torch.bfloat16,
    )
    linear: "bfloat16[1, 32]" = torch.ops.aten.linear.default(x, p_up_weight)
    return (convert_element_type_default_2, linear)
""")
