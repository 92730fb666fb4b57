"""Rotated heads: the values of each attention mixed by its two products alone, on every architecture that allows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qpass
from qpass.calibrate.rotate_heads import find_heads, rotate_heads
from qpass.calibrate.samples import Sample
from qpass.capture.capture_model import capture
from tests.qpass.calibrate.small_models import ARCHITECTURES, output_error, output_of, small_model, tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_computes_the_same(name: str) -> None:
    model, ids = small_model(name), tokens(1)[0]
    wanted, before = output_of(model, ids), {k: p.detach().clone() for k, p in model.named_parameters()}
    found, left = find_heads(capture(model))
    assert len(found) == 2 and not left, left
    assert all(heads.size == 16 for heads in found)
    notes = rotate_heads(model, capture(model), None, 0)  # unchecked: the graph alone must be right
    assert "2 attentions mixed within heads of 16 channels" in notes[-1]
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], before[name]) for heads in found
               for name in (heads.writer, heads.reader, heads.bias) if name)
    torch.testing.assert_close(output_of(model, ids), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_only_the_values_of_a_fused_product_turn() -> None:
    model = small_model("gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    before = model.get_parameter(name).detach().clone()
    rotate_heads(model, capture(model), None, 0)
    after = model.get_parameter(name)
    assert torch.equal(after[:, :128], before[:, :128]) and not torch.equal(after[:, 128:], before[:, 128:])


class Gated(nn.Module):
    """Attention whose values something else reads too, or whose result is scaled channel by channel."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.gate, self.way = nn.Parameter(torch.rand(32)), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(1, -1, 2, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 32)
        y = y * self.gate if self.way == "scaled" else y
        return self.o(y) + (v.sum() if self.way == "read" else 0)


@pytest.mark.parametrize(("way", "rotates"), [("plain", True), ("scaled", False), ("read", False)])
def test_what_does_not_commute_is_left(way: str, rotates: bool) -> None:
    torch.manual_seed(0)
    model, x = Gated(way).eval(), torch.randn(1, 5, 32)
    wanted, weight = model(x), model.v.weight.detach().clone()
    notes = rotate_heads(model, capture(model, (x,)), None, 0)
    assert torch.equal(model.v.weight, weight) != rotates and notes
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_wrong_one_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model("llama"), tokens(1)[0]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    monkeypatch.setattr("qpass.calibrate.rotation_math.Orthogonal.turn", lambda self, x: x.float() * 1.5)
    notes = rotate_heads(model, capture(model), Sample(args=(ids,), kwargs={}), 0)
    assert "taken back" in notes[-1]
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_in_a_recipe_with_the_stream() -> None:
    model = small_model("llama")
    recipe = {"scheme": "w8a16", "algorithms": [{"rotation": {"rotations": ["R1", "R2"]}}]}
    qpass.quantize(model, recipe, progress=False)
    report = str(qpass.explain(model))
    assert "64 channels mixed" in report and "mixed within heads of 16 channels" in report
    assert output_error(model, small_model("llama"), tokens(2)) < 1e-3
