"""static_activation: inputs of a model in, the scale of each layer's input out, and layers that round with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.activation_scale import ActivationScale, scale_of_range
from qpass.errors import CalibrationError, LoweringError, NoKernel, QPassError, RecipeError, WeightError
from qpass.kernels.reference.activation import quantize_static
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.lowering.pipeline import disable_pass
from qpass.scheme import ActivationArgs

STATIC = ("w8a8_static", "w8a8_static_asym", "w4a8_static")


class Block(nn.Module):
    """Two products of one tensor, in modules, and one of a bare parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(128, 128, dtype=dtype), nn.Linear(128, 128, bias=False, dtype=dtype)
        self.down = nn.Parameter(torch.randn(128, 32, dtype=dtype) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.nn.functional.silu(self.gate(x)) * self.up(x)) @ self.down


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def calibrated(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    x = torch.randn(6, 128).to(dtype) + 0.5
    model = qpass.quantize(Block(dtype).eval(), qpass.Recipe(scheme, ignore=[]), example_inputs=x,
                           calibration=[x[:2], (x[2:],)], progress=False)
    return model, x


def expected(layer: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64 from the definition."""
    scale = layer.activation_scale
    assert scale is not None
    s, zp = scale.scale.double(), 0 if scale.zero_point is None else scale.zero_point.double()
    q = ((x.float() / scale.scale.float()).round().double() + zp).clamp(-128, 127)
    y = ((q - zp) * s) @ layer.dequantize(torch.float32).double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("scheme", STATIC)
def test_scales_are_the_range_and_products_their_definition(scheme: str) -> None:
    model, x = calibrated(scheme)
    layers = packed_layers(model)
    assert set(layers) == {"gate", "up", "down"}
    gate = layers["gate"].activation_scale
    activation = layers["gate"].spec.activation
    assert gate is not None and activation is not None
    want = scale_of_range(float(x.min()), float(x.max()), activation, torch.float32)
    assert torch.equal(gate.scale, want.scale) and (gate.zero_point is None) == activation.symmetric
    assert want.zero_point is None or torch.equal(gate.zero_point, want.zero_point)  # type: ignore[arg-type]
    got = layers["gate"](x)
    torch.testing.assert_close(got.double(), expected(layers["gate"], x, layers["gate"].bias), rtol=1e-5, atol=1e-5)
    hidden = torch.nn.functional.silu(got) * layers["up"](x)
    torch.testing.assert_close(model(x).double(), expected(layers["down"], hidden), rtol=1e-5, atol=1e-5)


def test_values_beyond_the_range_saturate_and_zero_is_exact() -> None:
    activation = ActivationArgs(granularity="per_tensor", dynamic=False, symmetric=False)
    made = scale_of_range(0.5, 3.0, activation, torch.bfloat16)  # zero belongs to every range
    codes = quantize_static(torch.tensor([0.0, 3.0, 300.0, -5.0, float("inf"), float("nan")]), made.scale,
                            made.zero_point)
    assert codes.tolist() == [-128, 127, 127, -128, 127, 0]
    symmetric = scale_of_range(-2.0, 1.0, ActivationArgs(granularity="per_tensor", dynamic=False), torch.float32)
    assert symmetric.zero_point is None and float(symmetric.scale) == pytest.approx(2 / 127.5)
    assert scale_of_range(0.0, 0.0, activation, torch.float16).scale > 0


def test_compiled_equals_eager_and_one_input_is_rounded_once() -> None:
    model, x = calibrated("w8a8_static_asym")
    assert model.gate.input_scale is model.up.input_scale
    eager = model(x)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x), eager)
        assert torch.equal(compiled(torch.cat([x, x])), torch.cat([eager, eager]))
    rows = {row.name: row for row in qpass.explain(model).rows}
    assert rows["up.weight"].activation.startswith("shared with gate"), rows["up.weight"].activation
    assert rows["down"].activation.startswith("fused into"), rows["down"].activation
    assert rows["gate.weight"].effective == "w8a8 channel, x static asym"


def test_compiled_without_the_exposing_pass_is_still_right() -> None:
    model, x = calibrated("w8a8_static")
    eager = model(x)
    torch._dynamo.reset()
    with torch.no_grad(), disable_pass("expose_activation_quant"):
        assert torch.equal(torch.compile(model)(x), eager)


def test_checks_pass_and_see_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = calibrated("w8a8_static")
    monkeypatch.setenv("QPASS_CHECK", "1")
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model)(x), model(x))
        monkeypatch.setattr("qpass.lowering.check_quantization.quantize_static",
                            lambda x, *_: torch.full(x.shape, 7, dtype=torch.int8))
        torch._dynamo.reset()
        with pytest.raises(LoweringError, match="differs from the reference"):
            torch.compile(model)(x)


def test_gradient_passes_straight_through() -> None:
    model, x = calibrated("w8a8_static")
    x = x.clone().requires_grad_()
    model.gate(x).sum().backward()
    torch.testing.assert_close(x.grad, model.gate.dequantize().sum(0).expand_as(x))


@pytest.mark.parametrize("scheme", STATIC)
def test_state_dict_and_copies_keep_the_scales(scheme: str) -> None:
    model, x = calibrated(scheme)
    state = model.state_dict()
    assert state["gate.input_scale"].shape == (1,) and ("gate.input_zero_point" in state) == scheme.endswith("asym")
    other, _ = calibrated(scheme)
    other.gate.input_scale.fill_(9.0)
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    half = copy.deepcopy(model).half()
    assert half.gate.input_scale.dtype == torch.float32
    assert half(x.half()).dtype == torch.float16
    with pytest.raises(RuntimeError, match=r"gate: input_scale is -1.0"):
        other.load_state_dict({**state, "gate.input_scale": torch.tensor([-1.0])})


def test_saved_and_loaded(tmp_path: Any, tiny_llama: Any, token_ids: Tensor) -> None:
    model = qpass.quantize(tiny_llama(), "w8a8_static_asym", calibration=[{"input_ids": token_ids}], progress=False)
    expected_logits = model(token_ids).logits
    qpass.save(model, tmp_path / "m")
    again = qpass.load(tmp_path / "m")
    assert torch.equal(again(token_ids).logits, expected_logits)
    attention = again.model.layers[0].self_attn
    assert attention.q_proj.input_scale is attention.k_proj.input_scale is attention.v_proj.input_scale
    group = again.config.quantization_config["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] is False and group["input_activations"]["strategy"] == "tensor"
    assert isinstance(qpass.dequantize(again).model.layers[0].mlp.up_proj, nn.Linear)


class Inner(nn.Module):
    """A layer called by keyword, after a division that makes NaN of zeros; the NaN does not leave the block."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(input=x / x).nan_to_num()


class Late(nn.Module):
    """Two such blocks, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks[0](x) + self.blocks[1](x)


ALGORITHMS = ([], ["gptq"])


@pytest.mark.parametrize("algorithms", ALGORITHMS, ids=str)
def test_a_layer_called_by_keyword_has_a_range(algorithms: list[str]) -> None:
    x = torch.rand(8, 128) + 1
    recipe = qpass.Recipe("w8a8_static", ignore=[], algorithms=algorithms)
    model = qpass.quantize(Late().eval(), recipe, example_inputs=x, calibration=[x], progress=False)
    assert float(model.blocks[1].proj.input_scale) == pytest.approx(1 / 127.5, rel=1e-6)


@pytest.mark.parametrize("algorithms", ALGORITHMS, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_an_input_that_is_nan_once_is_never_forgotten(algorithms: list[str], first: bool) -> None:
    good = torch.rand(8, 128) + 1
    data = [torch.zeros(8, 128), good] if first else [good, torch.zeros(8, 128)]
    recipe = qpass.Recipe("w8a8_static", ignore=[], algorithms=algorithms)
    with pytest.raises(QPassError, match=r"blocks\.0\.proj\.weight.*NaN or Inf"):
        qpass.quantize(Late().eval(), recipe, example_inputs=good, calibration=data, progress=False)


def test_errors_say_what_to_do() -> None:
    x = torch.randn(2, 128)
    with pytest.raises(RecipeError, match=r"3 layers have static.*calibration="):
        qpass.quantize(Block(), qpass.Recipe("w8a8_static", ignore=[]), example_inputs=x)
    with pytest.raises(RecipeError, match="nothing in the recipe is calibrated"):
        qpass.quantize(Block(), qpass.Recipe("w8a8", ignore=[]), example_inputs=x, calibration=[x])
    with pytest.raises(RecipeError, match="holds no inputs"):
        qpass.quantize(Block(), qpass.Recipe("w8a8_static", ignore=[]), example_inputs=x, calibration=[])
    with pytest.raises(CalibrationError, match="was NaN or Inf"):
        qpass.quantize(Block(), qpass.Recipe("w8a8_static", ignore=[]), example_inputs=x, calibration=[x / 0])
    with pytest.raises(RecipeError, match="3 layers have static"):
        qpass.quantize(torch.export.export(Block(), (x,)), qpass.Recipe("w8a8_static", ignore=[]))
    layer = qpass.quantize(Block().eval(), qpass.Recipe("w8a8", ignore=[]), example_inputs=x, progress=False).gate
    assert isinstance(layer, QuantLinear)
    with pytest.raises(WeightError, match="only it has one"):
        QuantLinear(layer.canonical(), None, layer.spec, layer.dtype, scale=ActivationScale(scale=torch.ones(1)))
    for wrong in (torch.ones(2), torch.ones(1, dtype=torch.int8), torch.tensor([float("nan")]), torch.zeros(1)):
        with pytest.raises(WeightError, match="input_scale is"):
            ActivationScale(scale=wrong)


def test_activations_that_nothing_computes_stay_float_and_it_is_said() -> None:
    x = torch.randn(2, 128)
    model = qpass.quantize(Block().eval(), qpass.Recipe("w4afp8", ignore=[]), example_inputs=x, progress=False)
    row = qpass.explain(model).rows[0]
    assert (row.scheme, row.effective) == ("w4afp8", "w4a16 g128")
    assert row.reason == ("activation kept in float32 on this machine: "
                          "activation rounding to fp8 per token is not computed on cpu; exact=True emulates it")
    torch.testing.assert_close(model.gate(x), nn.functional.linear(x, model.gate.dequantize(), model.gate.bias),
                               rtol=1e-4, atol=1e-4)
    with pytest.raises(NoKernel, match="rounding to fp8 per token"):
        qpass.quantize(Block(), qpass.Recipe("w4afp8", ignore=[], on_unsupported_activation="error"), example_inputs=x)
    with pytest.raises(QPassError, match="rounding to int4 per token"):
        qpass.plan(Block(), qpass.Recipe("w4a4", ignore=[], on_unsupported_activation="error"), example_inputs=x)
