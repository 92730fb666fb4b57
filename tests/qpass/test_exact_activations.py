"""exact=True: a model of a float scheme gives what rounding its activations by the scheme gives, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import RecipeError
from qpass.kernels.reference.activation import rounded
from qpass.layers.packed_layers import PackedWeight
from qpass.spec import LinearSpec

SCHEMES = ("w4afp8", "fp8_dynamic", "fp8_block", "mxfp8", "mxfp6a8", "mxfp4", "mxfp4xfp8")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.nn.functional.silu(self.up(x)))
        return y


def made(scheme: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return qpass.quantize(Block(), scheme, example_inputs=torch.randn(3, 128), progress=False, **settings)


def step(layer: PackedWeight, x: Tensor) -> Tensor:
    """The layer in plain torch, from its own weight."""
    activation = qpass.PRESETS[ONE["scheme"]].activation
    assert activation is not None
    bias = getattr(layer, "bias", None)
    return torch.nn.functional.linear(rounded(x, activation), layer.dequantize(torch.float32), bias)


ONE: dict[str, str] = {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_are_rounded(scheme: str) -> None:
    ONE["scheme"] = scheme
    model, plain = made(scheme, exact=True), made(scheme)
    x = torch.randn(5, 128) * 3
    with torch.no_grad():
        got = model(x)
        want = step(model.down, torch.nn.functional.silu(step(model.up, x)))
        # The same numbers are added in another order; where that moves a number over a tie of the second rounding, one
        # output moves by a step of it.
        assert float((got - want).norm() / want.norm()) < 1e-3
        assert float((got - plain(x)).norm() / want.norm()) > 3e-3
        single = torch.nn.Sequential(model.up)(x)
        torch.testing.assert_close(single, step(model.up, x), rtol=1e-5, atol=1e-5)
    for row in qpass.explain(model).rows:
        number = qpass.PRESETS[scheme].activation.number  # type: ignore[union-attr]
        assert f"activation rounded to {number} per " in row.reason and "multiplied in float32" in row.reason
    for row in qpass.explain(plain).rows:
        assert "activation kept in float32 on this machine" in row.reason and "exact=True emulates it" in row.reason


def test_one_scale_for_all_tokens_is_not_said_to_be_emulated() -> None:
    """No kernel computes it, on any machine: a token's codes would depend on what else is in the batch."""
    row = qpass.explain(made("fp8_per_tensor", exact=True)).rows[0]
    assert row.activation == "not quantized" and "activation kept in float32" in row.reason
    assert "make each depend on the others" in row.reason and "exact=True emulates it" not in row.reason
    row = qpass.explain(made("fp8_per_tensor")).rows[0]
    assert "exact=True emulates it" not in row.reason


def test_as_compressed_tensors_rounds() -> None:
    tool = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    x = torch.randn(1, 7, 256) * torch.logspace(-4, 2, 7)[:, None]
    for scheme in ("FP8_DYNAMIC", "W4AFP8", "FP8_BLOCK", "MXFP8", "MXFP4"):
        args = tool.preset_name_to_scheme(scheme, ["Linear"]).input_activations
        scale, zero_point = helpers.compute_dynamic_scales_and_zp(x, args, module=nn.Linear(256, 4))
        want = forward.fake_quantize(x, scale, zero_point, args)
        activation = qpass.PRESETS[scheme.lower()].activation
        assert activation is not None
        torch.testing.assert_close(rounded(x, activation), want, rtol=1e-6, atol=0, msg=scheme)


def test_what_cannot_be_emulated_says_so() -> None:
    model = made("nvfp4", exact=True)
    reason = qpass.explain(model).rows[0].reason
    assert "activation kept in float32" in reason and "below a calibrated one is not emulated" in reason
    with pytest.raises(RecipeError, match="'emulate'"):
        qpass.Recipe("w4a8", on_unsupported_activation="nothing")  # type: ignore[arg-type]


def test_saved_loaded_and_compiled(tmp_path: Path) -> None:
    model, x = made("fp8_dynamic", exact=True), torch.randn(4, 128)
    with torch.no_grad():
        want = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), want, rtol=1e-4, atol=1e-4)
    assert model.up.spec.exact and LinearSpec.parse(str(model.up.spec)) == model.up.spec
    recipe = qpass.Recipe("fp8_dynamic", on_unsupported_activation="emulate")
    assert qpass.Recipe.from_dict(recipe.to_dict()) == recipe


def test_through_transformers(tmp_path: Path, tiny_llama: Any, token_ids: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "float")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "float", quantization_config=qpass.QPassConfig("fp8_dynamic", exact=True))
    plain = load(tmp_path / "float", quantization_config=qpass.QPassConfig("fp8_dynamic"))
    model.save_pretrained(tmp_path / "packed")
    again = [qpass.load(tmp_path / "packed", exact=True),
             load(tmp_path / "packed", quantization_config=qpass.QPassConfig(exact=True))]
    with torch.no_grad():
        want = model(token_ids).logits
        assert not torch.equal(plain(token_ids).logits, want)
        for loaded in again:
            assert torch.equal(loaded(token_ids).logits, want)
