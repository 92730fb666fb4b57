"""Gradients flow through a packed layer to its input and bias as through the float layer with the rounded weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qpass


@pytest.mark.parametrize("recipe", ["w4a8", "w4a16", "w8a8"])
def test_gradient_is_that_of_the_rounded_weight(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(128, 48), nn.Tanh(), nn.Linear(48, 8)).eval()
    qpass.quantize(model, recipe, example_inputs=torch.randn(2, 128), progress=False)
    x = torch.randn(3, 5, 128, requires_grad=True)
    y = model[0](x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.allclose(x.grad, grad @ model[0].dequantize(torch.float32), rtol=1e-5, atol=1e-5)
    assert torch.allclose(model[0].bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_same_result_with_and_without_grad() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    qpass.quantize(model.eval(), "w8a8", example_inputs=torch.randn(2, 64), progress=False)
    x = torch.randn(4, 64)
    with torch.no_grad():
        quiet = model(x)
    assert torch.equal(model(x), quiet)


@pytest.mark.filterwarnings("error:qpass:UserWarning")
def test_compiles_with_gradients_on() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
    qpass.quantize(model.eval(), "w8a8", example_inputs=torch.randn(2, 64), progress=False)
    x = torch.randn(4, 64)
    wanted = model(x)
    wanted.sum().backward()
    eager = model[0].weight.grad.clone()
    model.zero_grad()
    y = torch.compile(model, fullgraph=True)(x)
    y.sum().backward()
    assert torch.allclose(y, wanted, atol=2e-2)
    assert torch.allclose(model[0].weight.grad, eager, atol=2e-2)
