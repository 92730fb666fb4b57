"""Graphs given by the user: the same object comes back, its products rewritten, and computes what the module does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qpass
from qpass.errors import AlreadyQuantized, LayerRefused, WeightError
from qpass.layers.packed_layers import PackedWeight


class Mixed(nn.Module):
    """A Linear, a functional linear, a product with a stored [K, N] matrix, and one with a turned weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 96)
        self.middle = nn.Parameter(torch.randn(96, 96) / 10)
        self.down = nn.Parameter(torch.randn(96, 32) / 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(self.norm(x)))
        return (h @ self.middle.T) @ self.down


@pytest.fixture
def model() -> nn.Module:
    return Mixed().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 64)


@pytest.fixture
def wanted(model: nn.Module, x: Tensor) -> Tensor:
    """What the quantized module gives."""
    return qpass.quantize(copy.deepcopy(model), "w8a8", example_inputs=x, progress=False)(x)


def test_exported_graph_module(model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    graph = torch.export.export(model, (x,), strict=False).module()
    assert qpass.quantize(graph, "w8a8", example_inputs=x, progress=False) is graph
    assert torch.equal(graph(x), wanted)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert not any("linear.default" in t or "matmul" in t for t in targets)
    assert {"up.weight", "middle", "down"} <= set(targets)
    report = qpass.explain(graph)
    assert [row.status for row in report.rows] == ["quantized"] * 3


def test_symbolic_trace(model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    graph = torch.fx.symbolic_trace(model)
    assert qpass.quantize(graph, "w8a8", example_inputs=x, progress=False) is graph
    assert torch.equal(graph(x), wanted)


def test_dequantize_gives_a_float_graph_back(model: nn.Module, x: Tensor) -> None:
    graph = torch.export.export(model, (x,), strict=False).module()
    qpass.dequantize(qpass.quantize(graph, "w8a8", example_inputs=x, progress=False))
    assert not any(isinstance(module, PackedWeight) for module in graph.modules())
    error = (graph(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.02


def test_exported_program_keeps_its_signature(model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    program = torch.export.export(model, (x,), strict=False)
    assert qpass.quantize(program, "w8a8", progress=False) is program
    program.validate()
    assert torch.equal(program.module()(x), wanted)
    assert "up.weight" not in program.state_dict
    assert [row.status for row in qpass.explain(program).rows] == ["quantized"] * 3


def test_exported_program_saves_and_loads(model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    program = qpass.quantize(torch.export.export(model, (x,), strict=False), "w8a8", progress=False)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    assert torch.equal(torch.export.load(stream).module()(x), wanted)


def test_a_graph_is_not_quantized_twice(model: nn.Module, x: Tensor) -> None:
    graph = torch.export.export(model, (x,), strict=False).module()
    qpass.quantize(graph, "w8a8", example_inputs=x, progress=False)
    with pytest.raises(AlreadyQuantized, match="up"):
        qpass.quantize(graph, "w8a8", example_inputs=x, progress=False)


def test_a_program_is_not_quantized_twice(model: nn.Module, x: Tensor) -> None:
    program = qpass.quantize(torch.export.export(model, (x,), strict=False), "w8a8", progress=False)
    with pytest.raises(AlreadyQuantized):
        qpass.quantize(program, "w8a8", progress=False)


def test_nan_is_refused_before_the_graph_changes(model: nn.Module, x: Tensor) -> None:
    graph = torch.export.export(model, (x,), strict=False).module()
    with torch.no_grad():
        graph.get_parameter("down")[3, 4] = float("nan")
    before = graph.code
    with pytest.raises(WeightError, match="down"):
        qpass.quantize(graph, "w8a8", example_inputs=x, progress=False)
    assert graph.code == before


def test_a_weight_on_the_left_is_refused_or_reported(x: Tensor) -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64))
            self.right = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.right((self.w @ x.transpose(-1, -2)).transpose(-1, -2))

    graph = torch.export.export(Left().eval(), (x,), strict=False).module()
    try:
        qpass.quantize(graph, "w8a8", example_inputs=x, progress=False)
    except LayerRefused as error:
        assert "w" in str(error)
        return
    rows = {row.name: row for row in qpass.explain(graph).rows}
    assert rows["w"].status == "refused" and rows["w"].reason
    assert rows["right.weight"].status == "quantized"


def test_a_device_is_not_passed_over() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(64, 64)))
    x = torch.randn(2, 64)
    assert qpass.quantize(graph, "w8a16", example_inputs=x, device="cpu", progress=False) is graph
    program = torch.export.export(nn.Sequential(nn.Linear(64, 64)), (x,))
    with pytest.raises(TypeError, match="stays on the device"):
        qpass.quantize(program, "w8a16", device="cpu", progress=False)
