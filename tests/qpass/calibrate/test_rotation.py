"""Rotations: the matrices, the streams that the graph shows, and models that compute the same with mixed channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.calibrate.find_streams import find_streams
from qpass.calibrate.rotate import rotate
from qpass.calibrate.rotation_math import hadamard_like
from qpass.calibrate.samples import Sample
from qpass.capture.capture_model import capture
from qpass.errors import RecipeError
from tests.qpass.calibrate.small_models import ARCHITECTURES, output_error, output_of, small_model, tokens

# Readers, writers and whether rows keep their mean; None: a norm's output is added on, so nothing can be rotated.
STREAMS: dict[str, tuple[int, int, bool] | None] = {
    "llama": (11, 5, False), "qwen3": (11, 5, False), "gpt2": (5, 10, True), "phi": (9, 9, True), "gemma3": None,
    "bert": None, "mpnet": None}


def moe() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=16)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def with_outliers(model: nn.Module) -> nn.Module:
    """A few channels of the residual stream much larger than the others, as real models have them."""
    model.get_input_embeddings().weight.data[:, [3, 17]] *= 30  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("width", [1, 2, 7, 20, 28, 36, 96, 172, 184, 576, 896])
def test_the_matrix_is_orthogonal(width: int, keeps_mean: bool) -> None:
    matrix = hadamard_like(width, 3, keeps_mean=keeps_mean)
    q = matrix.turn(torch.eye(width)).double()
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-5)
    assert torch.equal(matrix.turn(torch.eye(width)), hadamard_like(width, 3, keeps_mean=keeps_mean).turn(
        torch.eye(width)))
    if keeps_mean:
        torch.testing.assert_close(q.sum(0), torch.ones(width, dtype=torch.float64), rtol=0, atol=1e-4)
    elif width in (2, 20, 28, 36, 96, 576, 896):  # Hadamard: every entry has one size
        torch.testing.assert_close(q.abs(), torch.full_like(q, width**-0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_computes_the_same(name: str) -> None:
    model, ids = small_model(name), tokens(1)[0]
    wanted, classes = output_of(model, ids), [type(module) for module in model.modules()]
    before = {key: p.detach().clone() for key, p in model.named_parameters(remove_duplicate=False)}
    found = capture(model)
    streams = [s for s in find_streams(found) if not s.pinned]
    notes = rotate(model, found, Sample(args=(ids,), kwargs={}), 0, ())
    expected = STREAMS[name]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert [type(module) for module in model.modules()] == classes
    if expected is None:
        assert not streams and "a norm's weight stands between its parts" in notes[0]
        assert all(torch.equal(after[key], data) for key, data in before.items())
        return
    (stream,) = streams
    assert (len(stream.readers), len(stream.writers), stream.keeps_mean) == expected
    assert all(not torch.equal(after[key], before[key]) for key in (
        *(r.weight for r in stream.readers), *(w.parameter for w in stream.writers)))
    assert all(bool((after[r.norm.weight.parameter] == 1).all()) for r in stream.readers if r.norm.weight)
    torch.testing.assert_close(output_of(model, ids), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_experts_are_rotated() -> None:
    model, ids = moe(), tokens(1)[0]
    wanted, before = output_of(model, ids), {k: p.detach().clone() for k, p in model.named_parameters()}
    rotate(model, capture(model), Sample(args=(ids,), kwargs={}), 0, ())
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        full = f"model.layers.0.mlp.{name}"
        assert not torch.equal(model.get_parameter(full), before[full])
    torch.testing.assert_close(output_of(model, ids), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_tied_head_is_untied_and_saved_so(tmp_path: Path) -> None:
    model, ids = small_model("gpt2"), tokens(1)[0]
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    done = qpass.quantize(model, {"scheme": "w8a16", "algorithms": ["rotation"]}, progress=False)
    assert done is model and model.lm_head.weight is not model.transformer.wte.weight  # type: ignore[union-attr]
    report = str(qpass.explain(model))
    assert "lm_head has a weight of its own now" in report and "64 channels mixed" in report
    row = next(line for line in report.splitlines() if "lm_head.weight" in line and "kept" in line)
    assert "0 B" not in row  # it is counted where it is
    qpass.save(model, tmp_path / "saved")
    back = qpass.load(tmp_path / "saved")
    torch.testing.assert_close(output_of(back, ids), output_of(model, ids), rtol=0, atol=0)


def test_a_tied_head_that_is_quantized_stays_tied() -> None:
    model = small_model("gpt2")
    qpass.quantize(model, {"scheme": "w8a16", "overrides": {"lm_head": "w8a16"}, "algorithms": ["rotation"]},
                   progress=False)
    assert "which the recipe quantizes and a rotation would untie" in str(qpass.explain(model))


class Net(nn.Module):
    """A stream of 16 channels between two tables, with an op in its middle that a test chooses."""

    def __init__(self, middle: Any) -> None:
        super().__init__()
        self.table, self.norm, self.middle = nn.Embedding(32, 16), nn.LayerNorm(16), middle
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.norm(self.middle(x)))


@pytest.mark.parametrize(("middle", "rotates"), [
    (lambda x: x, True), (lambda x: x * 0.5, True), (lambda x: x[:, -1:], True), (lambda x: x.flatten(0, 1), True),
    (lambda x: torch.cat([x, x], 1), True), (lambda x: x * x.pow(2).mean(-1, keepdim=True), True),
    (lambda x: x.mean(1, keepdim=True), True), (lambda x: -x, True), (lambda x: x - 2 * x, True),
    (torch.relu, False), (lambda x: x.flip(-1), False), (lambda x: x + 1, False), (lambda x: x * x, False),
    (lambda x: x * x.mean(-1, keepdim=True), False), (lambda x: torch.cat([x[..., :8], x[..., 8:]], -1), False),
    (lambda x: x.view(2, -1, 4, 4).transpose(2, 3).reshape(2, -1, 16), False),
    (lambda x: x.masked_fill(x > 1, 0.0), False), (lambda x: x[..., torch.arange(15, -1, -1)], False)])
def test_only_what_commutes_with_a_rotation_is_gone_through(middle: Any, rotates: bool) -> None:
    torch.manual_seed(0)
    model, ids = Net(middle).eval(), torch.randint(0, 32, (2, 5))
    model.norm.bias.data.normal_()
    wanted, weight = model(ids), model.up.weight.detach().clone()
    notes = rotate(model, capture(model, (ids,)), None, 0, ())  # unchecked: the graph alone must be right
    assert torch.equal(model.up.weight, weight) != rotates, notes
    torch.testing.assert_close(model(ids), wanted, rtol=1e-3, atol=1e-5)


def test_a_parameter_that_is_read_elsewhere_is_left() -> None:
    class Shared(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.up.weight.sum()

    model, ids = Shared(nn.Identity()), torch.randint(0, 32, (2, 5))
    notes = rotate(model, capture(model, (ids,)), None, 0, ())
    assert "up.weight is read by something else too" in notes[0]


def test_a_wrong_rotation_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model("gpt2"), tokens(1)[0]
    before = {key: p.detach().clone() for key, p in model.named_parameters(remove_duplicate=False)}
    monkeypatch.setattr("qpass.calibrate.rotation_math.Orthogonal.turn", lambda self, x: x.flip(-1) * 1.5)
    notes = rotate(model, capture(model), Sample(args=(ids,), kwargs={}), 0, ())
    assert "more than rounding does; taken back" in notes[-1]
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters(remove_duplicate=False))
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


def test_outliers_cost_less_and_it_composes_with_gptq() -> None:
    ids = tokens(8)
    reference = with_outliers(small_model("llama"))
    plain, rotated, both = (qpass.quantize(with_outliers(small_model("llama")), {
        "scheme": "w8a8", "ignore": ["lm_head"], "algorithms": algorithms}, calibration=data, progress=False)
        for algorithms, data in (([], None), (["rotation"], None), (["rotation", "gptq"], ids)))
    errors = [output_error(model, reference, ids) for model in (plain, rotated, both)]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[0], errors


def test_experts_and_gptq_after_a_rotation() -> None:
    model, ids = moe(), tokens(8)
    qpass.quantize(model, {"scheme": "w8a16", "algorithms": ["rotation", "gptq"]}, calibration=ids, progress=False)
    report = str(qpass.explain(model))
    assert "64 channels mixed" in report and "are rounded to nearest" not in report
    assert output_error(model, moe(), ids) < 1e-3


def test_it_stands_first_and_takes_no_targets() -> None:
    with pytest.raises(RecipeError, match="list it first"):
        qpass.Recipe("w4a16", algorithms=["gptq", "rotation"])
    with pytest.raises(RecipeError, match="goes through the whole model"):
        qpass.Recipe("w4a16", algorithms=[{"rotation": {"targets": ["*.q_proj"]}}])
