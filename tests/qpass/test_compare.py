"""compare: against errors computed by hand, on both kinds of swapped layer, and on models that do not match."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qpass
from qpass.errors import EvaluationError
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.layers.quant_weight import QuantWeight


class TwoLinears(nn.Module):
    """One layer is a module, the other a parameter in a forward that does more."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Parameter(torch.randn(96, 64) / 10)
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.down + self.bias


def pair(scheme: str = "w4a16", x: Tensor | None = None) -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(2, 5, 64) if x is None else x
    reference = TwoLinears().eval()
    model = qpass.quantize(copy.deepcopy(reference), scheme, example_inputs=x, progress=False)
    return reference, model, x


def sqnr(got: Tensor, want: Tensor) -> float:
    return float(10 * torch.log10(want.double().square().sum() / (got.double() - want.double()).square().sum()))


def test_errors_are_those_computed_by_hand() -> None:
    reference, model, x = pair()
    assert {type(m) for m in model.modules() if isinstance(m, PackedWeight)} == {QuantLinear, QuantWeight}
    up, down = qpass.compare(reference, model, x).rows
    with torch.no_grad():
        hidden, wanted = model.up(x), reference.up(x)
        assert (up.name, up.calls) == ("up", 1)
        assert up.local.sqnr_db == pytest.approx(sqnr(hidden, wanted), rel=1e-4) and up.local == up.accumulated
        assert up.local.max_abs == pytest.approx(float((hidden - wanted).abs().max()), rel=1e-4)
        assert up.local.relative == pytest.approx(float((hidden - wanted).norm() / wanted.norm()), rel=1e-4)
        weight = model.down.dequantize()
        product = F.linear(hidden.relu(), weight)
        assert down.name == "down"
        assert down.local.sqnr_db == pytest.approx(sqnr(product, hidden.relu() @ reference.down), rel=1e-3)
        assert down.accumulated.sqnr_db == pytest.approx(sqnr(product, wanted.relu() @ reference.down), rel=1e-3)
        assert down.accumulated.sqnr_db < down.local.sqnr_db


def test_output_is_compared_too() -> None:
    reference, model, x = pair("w8a8")
    with torch.no_grad():
        want = sqnr(model(x), reference(x))
    assert qpass.compare(reference, model, x).output.sqnr_db == pytest.approx(want, rel=1e-4)


def test_every_quantized_layer_of_a_language_model_in_order(tiny_llama: Any, token_ids: Tensor) -> None:
    reference = tiny_llama()
    model = qpass.quantize(copy.deepcopy(reference), "w8a8", progress=False)
    got = qpass.compare(reference, model, {"input_ids": token_ids})
    names = [n for n, m in model.named_modules() if isinstance(m, PackedWeight)]
    assert sorted(row.name for row in got.rows) == sorted(names) and got.never_called == ()
    assert got.rows[0].name == "model.layers.0.self_attn.q_proj" and got.rows[-1].name == "model.layers.1.mlp.down_proj"
    assert all(30 < row.local.sqnr_db < 60 for row in got.rows) and got.first_wrong is None
    model = qpass.quantize(copy.deepcopy(reference), "w4a8_channel", progress=False)
    coarse = qpass.compare(reference, model, token_ids)
    assert all(a.local.sqnr_db > b.local.sqnr_db + 10 for a, b in zip(got.rows, coarse.rows, strict=True))


def test_both_models_are_left_as_they_were(tiny_llama: Any, token_ids: Tensor) -> None:
    reference = tiny_llama()
    model = qpass.quantize(copy.deepcopy(reference), "w8a8", progress=False)
    before = [model(token_ids).logits, reference(token_ids).logits]
    qpass.compare(reference, model, token_ids)
    for one in (reference, model):
        assert not any(m._forward_hooks or "multiply" in m.__dict__ for m in one.modules())
    assert torch.equal(before[0], model(token_ids).logits) and torch.equal(before[1], reference(token_ids).logits)
    with pytest.raises(RuntimeError):
        qpass.compare(reference, model, torch.randn(3))
    assert not any(m._forward_hooks or "multiply" in m.__dict__ for one in (reference, model) for m in one.modules())


def test_the_first_layer_that_goes_wrong_is_named(tiny_llama: Any, token_ids: Tensor) -> None:
    reference = tiny_llama()
    model = qpass.quantize(copy.deepcopy(reference), "w8a16", progress=False)
    wrong = model.model.layers[1].self_attn.o_proj
    changed = wrong.canonical()
    changed.scale.mul_(3)
    wrong._pack(changed, wrong.spec)
    got = qpass.compare(reference, model, token_ids)
    assert got.first_wrong is not None and got.first_wrong.name == "model.layers.1.self_attn.o_proj"
    assert [row.name for row in got.rows if row.wrong] == [got.first_wrong.name]
    assert got.rows[-1].accumulated.sqnr_db < got.rows[-1].local.sqnr_db
    assert "first layer that goes wrong: model.layers.1.self_attn.o_proj: its own error is" in str(got)


def test_nan_is_wrong_and_counted(tiny_llama: Any, token_ids: Tensor) -> None:
    reference = tiny_llama()
    model = qpass.quantize(copy.deepcopy(reference), "w8a16", progress=False)
    broken = model.model.layers[0].mlp.up_proj
    changed = broken.canonical()
    changed.scale[0] = math.nan
    broken._pack(changed, broken.spec)
    first = qpass.compare(reference, model, token_ids).first_wrong
    assert first is not None and first.name == "model.layers.0.mlp.up_proj"
    assert first.local.nonfinite == token_ids.numel() and "NaN or Inf where the reference has none" in first.wrong


def test_a_layer_called_twice_and_one_never_called() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor, use_spare: bool = False) -> Tensor:
            y = self.layer(self.layer(x))
            return self.spare(y) if use_spare else y

    x = torch.randn(3, 64)
    reference = Twice().eval()
    model = qpass.quantize(copy.deepcopy(reference), "w8a8", example_inputs=(x, True), progress=False)
    got = qpass.compare(reference, model, x)
    assert [(row.name, row.calls) for row in got.rows] == [("layer", 2)] and got.never_called == ("spare",)
    assert "1 quantized layers were not reached" in str(got)


def test_a_compiled_model_is_compared_by_its_eager_form() -> None:
    reference, model, x = pair("w8a8")
    eager = qpass.compare(reference, model, x)

    def refuses(graph: Any, inputs: Any) -> Any:
        raise AssertionError("nothing is to be compiled")

    assert qpass.compare(torch.compile(reference, backend=refuses), torch.compile(model, backend=refuses), x) == eager


def test_table_is_aligned(tiny_llama: Any, token_ids: Tensor) -> None:
    reference = tiny_llama()
    model = qpass.quantize(copy.deepcopy(reference), "w4a8", progress=False)
    lines = str(qpass.compare(reference, model, token_ids)).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1 and len(lines[0]) <= 120
    assert lines[0].split()[0] == "layer" and lines[-2].startswith("output of the model")


def test_models_that_do_not_belong_together() -> None:
    reference, model, x = pair()
    with pytest.raises(EvaluationError, match="one object"):
        qpass.compare(model, model, x)
    with pytest.raises(EvaluationError, match="nothing in this TwoLinears is quantized"):
        qpass.compare(model, reference, x)
    with pytest.raises(EvaluationError, match="the reference has nothing at 'up'"):
        qpass.compare(nn.Identity(), model, x)
