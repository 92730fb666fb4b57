"""Gradients through packed experts equal those of the float module that dequantize gives back, rounding ignored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.layers.experts_layer import QuantExperts
from tests.small_experts import Experts, Mixture

E, H, N = 4, 32, 32


BIASES = ("up_bias", "down_bias")


def mixture(alternating: bool, biases: tuple[str, ...] = BIASES) -> Mixture:
    made = Mixture(Experts(E, H, N, biased=True, alternating=alternating)).eval()
    for name in set(BIASES) - set(biases):
        setattr(made.experts, name, None)
    return made


def gradients(model: nn.Module, x: Tensor, run: nn.Module | None = None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    (model if run is None else run)(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}


@pytest.mark.parametrize(("alternating", "biases"), [
    (False, BIASES), (True, BIASES), (False, ()), (False, BIASES[:1]), (False, BIASES[1:])],
    ids=["halves", "alternating", "no-bias", "bias-of-the-first", "bias-of-the-second"])
def test_gradients_are_those_of_the_dequantized_experts(alternating: bool, biases: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x = mixture(alternating, biases), torch.randn(9, H)
    recipe = qpass.Recipe(None, overrides={"experts.up": "w8a8", "experts.down": "w8a8"})
    qpass.quantize(model, recipe, example_inputs=x, progress=False)
    assert isinstance(model.experts, QuantExperts)
    got = gradients(model, x)
    compiled = gradients(model, x, torch.compile(model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    qpass.dequantize(model)
    want = gradients(model, x)
    assert set(got) == {"x", "gate.weight", *(f"experts.{name}" for name in biases)}
    for name, value in got.items():
        assert torch.allclose(compiled[name], value, rtol=1e-4, atol=1e-4), name
        error = float((value - want[name]).norm() / want[name].norm())
        assert error < 0.03, (name, error)  # activations are rounded to 8 bits here, and not there


def test_a_token_of_experts_elsewhere_gets_no_gradient() -> None:
    torch.manual_seed(1)
    model = mixture(False)
    qpass.quantize(model, qpass.Recipe(None, overrides={"experts": "w8a8"}), example_inputs=torch.randn(9, H),
                   progress=False)
    x, weight = torch.randn(3, H, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    model.experts(x, torch.tensor([[E, E], [0, E], [1, 2]]), weight).sum().backward()
    assert not x.grad[0].any() and x.grad[1].any()
    assert torch.equal(weight.grad.ne(0), torch.tensor([[False, False], [True, False], [True, True]]))
