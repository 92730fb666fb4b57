"""Match float: sums are seen where a product's output is added; a corrected layer makes up for errors before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.calibrate.match_float import WatchSums
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import QUICK_FIRST, output_error, small_model, tokens


def sums_of(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad(), WatchSums({name: model.get_parameter(name) for name in names}, lambda name, product: None,
                                    found.__setitem__):
        model(x)
    return found


def test_sums_are_seen_through_views_and_biases_and_nothing_else_is() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.shift = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            h = x + self.a(x)
            g = self.b(h).sigmoid() + h
            return g + (self.c(g) + self.shift).view(g.shape)

    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 8)
    found = sums_of(block, x, ["a.weight", "b.weight", "c.weight"])
    assert found.keys() == {"a.weight", "c.weight"}
    torch.testing.assert_close(found["a.weight"], x + block.a(x))
    torch.testing.assert_close(found["c.weight"], block(x))


@pytest.mark.parametrize("name", QUICK_FIRST)
def test_closer_to_the_float_model_than_each_layer_for_itself(name: str) -> None:
    data, reference = tokens(24, 48), small_model(name)
    scheme = PRESETS["w4a8" if name == "gpt2" else "w4a16"].with_group_size(32)
    errors = []
    for match in (False, True):
        model = qpass.quantize(small_model(name), qpass.Recipe(scheme, algorithms=[{"gptq": {"match_float": match}}]),
                               calibration=data, progress=False)
        errors.append(output_error(model, reference, tokens(8, 48, seed=9)))
    assert errors[1] < 0.95 * errors[0]


def test_too_few_tokens_are_said_and_leave_each_layer_to_itself() -> None:
    recipes = [qpass.Recipe(PRESETS["w4a16"].with_group_size(32), algorithms=[{"gptq": {"match_float": match}}])
               for match in (False, True)]
    outputs = []
    for recipe in recipes:
        model = qpass.quantize(small_model("llama"), recipe, calibration=tokens(1, 40), progress=False)
        outputs.append(model)
    assert any("too few to make up for errors" in note for note in qpass.explain(outputs[1]).notes)
    assert not any("too few" in note for note in qpass.explain(outputs[0]).notes)
