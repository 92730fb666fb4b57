"""Probe: tokens are drawn for models that take tokens, fit them, and are the same under one seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.calibrate.probe import drawn_samples
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import ARCHITECTURES, output_error, output_of, small_model, tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_on_what_is_drawn(name: str) -> None:
    model = small_model(name)
    samples = drawn_samples(model, None, 200, seed=3)
    again = drawn_samples(model, None, 200, seed=3)
    assert sum(sample.kwargs["input_ids"].numel() for sample in samples) >= 200
    assert all(torch.equal(a.kwargs["input_ids"], b.kwargs["input_ids"]) for a, b in zip(samples, again, strict=True))
    assert bool(torch.isfinite(output_of(model, samples[0].kwargs["input_ids"])).all())


def test_positional_ids_and_models_without_tokens() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    sample, = drawn_samples(Bag(), (torch.zeros(2, 3, dtype=torch.long),), 64, seed=0)
    assert sample.args[0].shape == (1, 64) and int(sample.args[0].max()) < 50 and not sample.kwargs
    assert drawn_samples(nn.Sequential(nn.Linear(8, 8)), None, 64, seed=0) == []
    assert drawn_samples(Bag(), None, 0, seed=0) == []


def test_scales_weigh_their_errors_by_what_the_drawn_tokens_show() -> None:
    def unequal() -> nn.Module:
        """A few channels that every layer sees are ten times as large."""
        model = small_model("llama")
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.data[::16] *= 10
        return model

    scheme, reference, data = PRESETS["w4a16"].with_group_size(32), unequal(), tokens(4)
    errors = []
    for probe in (0, 256):
        recipe = qpass.Recipe(scheme, algorithms=[{"scales": {"probe": probe}}])
        model = qpass.quantize(unequal(), recipe, progress=False)
        errors.append(output_error(model, reference, data))
        assert ("drawn at random" in "\n".join(qpass.explain(model).notes)) == (probe > 0)
    assert errors[1] < 0.8 * errors[0]
