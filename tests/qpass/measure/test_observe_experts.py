"""compare and explain on experts: errors of each projection as computed by hand, bytes of each expert."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qpass
from tests.small_experts import Experts, Mixture

E, H, N = 4, 32, 64
RECIPE = qpass.Recipe(None, overrides={"experts.up": "w4a16", "experts.down": "w8a16"})


def pair(recipe: qpass.Recipe = RECIPE, **options: bool) -> tuple[Mixture, Mixture, Tensor]:
    torch.manual_seed(4)
    x = torch.randn(11, H)
    reference = Mixture(Experts(E, H, N, **options)).eval()
    return reference, qpass.quantize(copy.deepcopy(reference), recipe, example_inputs=x, progress=False), x


def sqnr(got: Tensor, want: Tensor) -> float:
    return float(10 * torch.log10(want.double().square().sum() / (got.double() - want.double()).square().sum()))


@torch.no_grad()
def test_errors_of_projections_are_those_computed_by_hand() -> None:
    reference, model, x = pair()
    up, down, whole = qpass.compare(reference, model, x).rows
    assert (up.name, down.name, whole.name) == ("experts.up", "experts.down", "experts")
    index = reference.gate(x).softmax(-1).topk(2, -1).indices
    rows = [(e, x[(index == e).any(-1)]) for e in range(E)]
    y = [part @ model.experts.dequantize(0, e).t() for e, part in rows]
    wanted = [part @ reference.experts.up[e].t() for e, part in rows]
    assert up.local.sqnr_db == pytest.approx(sqnr(torch.cat(y), torch.cat(wanted)), rel=1e-3)
    assert up.local == up.accumulated  # before it nothing is rounded
    h = [F.silu(g) * u for g, u in (one.chunk(2, -1) for one in y)]
    z = [part @ model.experts.dequantize(1, e).t() for e, part in enumerate(h)]
    wanted = [part @ reference.experts.down[e].t() for e, part in enumerate(h)]
    assert down.local.sqnr_db == pytest.approx(sqnr(torch.cat(z), torch.cat(wanted)), rel=1e-3)
    assert down.accumulated.sqnr_db < down.local.sqnr_db
    assert whole.accumulated.sqnr_db == pytest.approx(sqnr(model(x), reference(x)), rel=1e-3)


@pytest.mark.parametrize("options", [{"biased": True}, {"alternating": True}], ids=["biased", "alternating"])
def test_other_shapes_of_experts(options: dict[str, bool]) -> None:
    reference, model, x = pair(qpass.Recipe(None, overrides={"experts": "w8a8"}), **options)
    rows = qpass.compare(reference, model, x).rows
    assert [row.name for row in rows] == ["experts.up", "experts.down", "experts"]
    assert all(30 < row.local.sqnr_db < 60 for row in rows)


def test_the_projection_that_is_broken_is_the_first_that_is_wrong() -> None:
    reference, model, x = pair()
    with torch.no_grad():
        reference.experts.down.copy_(torch.randn(E, H, N) / 8)
    found = qpass.compare(reference, model, x).first_wrong
    assert found is not None and found.name == "experts.down"


def test_a_quantized_reference() -> None:
    reference, model, x = pair()
    finer = qpass.quantize(reference, qpass.Recipe(None, overrides={"experts": "w8a16"}), example_inputs=x,
                           progress=False)
    rows = qpass.compare(finer, model, x).rows
    assert [row.name for row in rows] == ["experts.up", "experts.down", "experts"]


def test_explain_tells_the_bytes_of_an_expert_and_the_kernel() -> None:
    _, model, _ = pair()
    report = qpass.explain(model)
    rows = {row.name: row for row in report.rows}
    assert rows["experts.up"].bytes_an_expert * E == rows["experts.up"].bytes_after == model.experts.part_bytes("up")
    assert rows["experts.up"].kernel is not None and rows["experts.up"].kernel.startswith("experts_")
    assert " an expert" in str(report)
