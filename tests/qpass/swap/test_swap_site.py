"""Swap: owners and parameters replaced, tied and shared ones once, and the way back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qpass
from qpass.errors import QPassError
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.layers.quant_weight import QuantWeight


class Scaled(nn.Linear):
    """A subclass whose forward is more than the product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 3


class Transposed(nn.Module):
    """y = x @ w + b with w stored [K, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(k, n) / 8), nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


def quantize(model: nn.Module, x: Tensor, scheme: str = "w8a16") -> nn.Module:
    return qpass.quantize(model.eval(), scheme, example_inputs=(x,), progress=False)  # type: ignore[no-any-return]


X = torch.randn(5, 64)


def close(a: Tensor, b: Tensor) -> None:
    """8-bit weights move an output by about half a percent of its size."""
    assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("build", [
    lambda: nn.Linear(64, 32), lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16, bias=False)),
    lambda: Scaled(64, 32), lambda: nn.Sequential(Scaled(64, 32)), lambda: nn.Sequential(Transposed(64, 96)),
    lambda: Transposed(64, 64), lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), Transposed(64, 8)),
], ids=["a linear alone", "sequential", "subclass alone", "subclass", "transposed", "square, alone", "mixed"])
def test_outputs_stay_and_come_back(build: object) -> None:
    model = build()  # type: ignore[operator]
    before = model(X)
    classes = [type(module) for module in model.modules()]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    quantize(model, X)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert packed
    close(model(X), before)
    with_packed = model(X)
    assert qpass.dequantize(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    torch.testing.assert_close(model(X), with_packed, rtol=1e-4, atol=1e-4)
    with pytest.raises(QPassError, match="nothing in this model is quantized"):
        qpass.dequantize(model)
    quantize(model, X)


def test_a_module_under_two_names_is_replaced_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    before = model(X)
    quantize(model, X)
    assert isinstance(model[0], QuantLinear) and model[0] is model[2]
    close(model(X), before)
    qpass.dequantize(model)
    assert model[0] is shared and model[2] is shared


def test_tied_weights_with_biases_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    model[2].weight = model[3].weight = model[0].weight
    before = model(X)
    quantize(model, X)
    first, second, third = model[0], model[2], model[3]
    assert all(isinstance(layer, QuantLinear) for layer in (first, second, third))
    assert len({id(layer._buffers) for layer in (first, second, third)}) == 1
    assert (first.bias is None, second.bias is None, third.bias is None) == (False, True, False)
    close(model(X), before)


def test_the_float_weight_is_freed_and_one_copy_is_left() -> None:
    import weakref

    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    gone = [weakref.ref(model[i].weight.untyped_storage()) for i in range(2)]
    pointers = [model[i].weight.data_ptr() for i in range(2)]
    quantize(model, X, "w4a8")
    assert not list(model.parameters())
    held = [tensor.data_ptr() for tensor in model.buffers()]
    assert not set(held) & set(pointers)
    assert all(ref() is None for ref in gone)


def test_parameter_and_bias_of_another_dtype() -> None:
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    model[0].bias = nn.Parameter(model[0].bias.detach().float())

    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model[0]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight) + self.inner.bias

    one = Forward()
    x = X.bfloat16()
    before = one(x)
    quantize(one, x)
    assert isinstance(one.inner.weight, QuantWeight)
    assert one(x).dtype == before.dtype == torch.float32
    close(one(x), before)


def test_extra_state_of_replaced_modules_survives() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    model[0].note = "mine"
    original = model[0]
    quantize(model, X)
    assert qpass.dequantize(model)[0] is original and model[0].note == "mine"


def test_a_forward_that_casts_its_weight_to_what_it_is() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 64) / 8)
            self.out = nn.Linear(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(F.linear(x.type(torch.float32), self.w.type(torch.float32)))
            return self.out(y) @ self.w.data.to(y.dtype).t()  # type: ignore[no-any-return]

    model = Careful()
    before = model(X)
    quantize(model, X)
    assert isinstance(model.w, QuantWeight) and model.w.dtype == torch.float32
    close(model(X), before)


def test_what_else_a_replaced_module_says_of_itself_stays() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scaling = nn.Parameter(torch.randn(64, 48) / 8), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Lazy()

        def forward(self, x: Tensor) -> Tensor:
            assert self.inner.weight.shape == (64, 48)  # as it was stored
            return self.inner(x) * self.inner.scaling  # type: ignore[no-any-return]

    model = Parent()
    before = model(X)
    quantize(model, X)
    assert isinstance(model.inner, QuantLinear)
    close(model(X), before)
    assert torch.equal(X @ model.inner.weight, model.inner(X))  # type: ignore[operator]
    assert [*qpass.dequantize(model).inner.state_dict()] == ["weight"] and model.inner.scaling == 0.5
