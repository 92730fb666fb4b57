"""Calibration as a whole: kinds of data, padding, determinism, files past a limit, resuming, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.calibrate.samples import read_samples
from qpass.errors import CalibrationError, RecipeError, UnmatchedRule
from qpass.layers.packed_layers import PackedWeight
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import output_of, small_model, tokens

SCHEME = PRESETS["w4a16"].with_group_size(32)
GPTQ = qpass.Recipe(SCHEME, algorithms=["gptq"])


def calibrated(data: Any, recipe: qpass.Recipe = GPTQ, **more: Any) -> nn.Module:
    return qpass.quantize(small_model("llama"), recipe, calibration=data, progress=False, **more)  # type: ignore[no-any-return]


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.canonical().qweight.clone() for name, module in model.named_modules()
            if isinstance(module, PackedWeight)}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = codes(one), codes(other)
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[name], b[name]) for name in a)


class Letters:
    """A tokenizer: one token a letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 120 for letter in text]}


def test_equal_calls_give_equal_models() -> None:
    assert same(calibrated(tokens(4)), calibrated(tokens(4)))
    assert not same(calibrated(tokens(4)), calibrated(tokens(4, seed=1)))


def test_padding_does_not_count() -> None:
    plain = tokens(4, 20)
    noise = tokens(4, 9, seed=5)
    padded = [{"input_ids": torch.cat([ids, rest], 1),
               "attention_mask": torch.tensor([[1] * 20 + [0] * 9])} for ids, rest in zip(plain, noise, strict=True)]
    exact = [{"input_ids": ids, "attention_mask": torch.ones(1, 20, dtype=torch.long)} for ids in plain]
    # Ranges as they are: sums run in another order over the longer sequences, and a search settles near ties by them.
    recipe = qpass.Recipe(SCHEME, algorithms=[{"gptq": {"scales": "absmax"}}])
    one, other = codes(calibrated(exact, recipe)), codes(calibrated(padded, recipe))
    assert all((one[name] == other[name]).float().mean() > 0.995 for name in one)
    unmasked = codes(calibrated([sample["input_ids"] for sample in padded]))
    assert min((one[name] == unmasked[name]).float().mean() for name in one) < 0.99


def test_samples_of_different_length_from_a_generator() -> None:
    model = calibrated(ids for length in (5, 17, 40) for ids in tokens(1, length))
    assert any("gptq on 3 samples" in note for note in qpass.explain(model).notes)


def test_texts_and_files(tmp_path: Path) -> None:
    model = small_model("llama")
    read = read_samples(["abc", "defgh"], model, tokenizer=Letters(), num_samples=8, max_seq_length=4)
    assert [sample.kwargs.get("input_ids", sample.args[0]).shape for sample in read] == [(1, 3), (1, 4)]
    book = tmp_path / "book.txt"
    book.write_text("".join(chr(97 + i % 26) for i in range(103)))
    windows = read_samples(book, model, tokenizer=Letters(), num_samples=4, max_seq_length=10)
    whole = torch.tensor(Letters()(book.read_text())["input_ids"])
    assert [torch.equal(sample.args[0][0], whole[start:start + 10]) for sample, start in zip(
        windows, (0, 20, 50, 70), strict=True)] == [True] * 4
    assert len(read_samples([str(book), book], model, tokenizer=Letters(), num_samples=5, max_seq_length=10)) == 5
    assert same(calibrated(str(book), tokenizer=Letters(), num_samples=3, max_seq_length=16),
                calibrated(book, tokenizer=Letters(), num_samples=3, max_seq_length=16))


def test_activations_past_the_limit_lie_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from qpass.calibrate import activation_store

    written = []
    save = activation_store.save_file
    monkeypatch.setattr(activation_store, "save_file", lambda tensors, path: written.append(save(tensors, path)))
    limited = calibrated(tokens(4), memory_limit=20_000)
    assert len(written) > 8
    assert same(limited, calibrated(tokens(4)))


def test_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qpass.calibrate import gptq

    recipe = qpass.Recipe(SCHEME, algorithms=["smoothquant", "gptq"])
    whole, calibrate, done = calibrated(tokens(4), recipe), gptq.calibrate, []

    def interrupted(settings: Any, work: Any) -> None:
        if done and done[-1] != "resumed":
            raise KeyboardInterrupt
        done.append(work.block.path)
        calibrate(settings, work)

    monkeypatch.setattr(gptq, "calibrate", interrupted)
    model = small_model("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt) as stopped:
        qpass.quantize(model, recipe, calibration=tokens(4), progress=False, work_folder=tmp_path)
    assert "interrupted after 7 of 14 layers" in stopped.value.__notes__[0]
    left = dict(model.named_parameters())
    assert all(torch.equal(left[name], before[name]) for name in left if name.startswith("model.layers.1."))
    assert sum(name.startswith("model.layers.1.") for name in left) == 9
    done.append("resumed")
    assert same(calibrated(tokens(4), recipe, work_folder=tmp_path), whole)
    assert done == ["model.layers.0", "resumed", "model.layers.1"]
    with pytest.raises(CalibrationError, match="another model, recipe or data"):
        calibrated(tokens(4, seed=2), recipe, work_folder=tmp_path)


def test_float_parameters_keep_their_dtype_and_numbers() -> None:
    model = small_model("llama", torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    qpass.quantize(model, GPTQ, calibration=tokens(2), progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.bfloat16 and torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(("data", "message"), [
    ([], "holds no sample"),
    ([3], "a calibration sample is a tensor"),
    (torch.zeros(1, 4, dtype=torch.long), "Put a single input into a list"),
    ([{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}], "masks every one"),
], ids=["empty", "number", "tensor", "masked"])
def test_data_that_cannot_be_used(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrated(data)


def test_data_missing_or_for_nothing() -> None:
    with pytest.raises(RecipeError, match="gptq, which needs data"):
        calibrated(None)
    with pytest.raises(UnmatchedRule, match="nowhere"):
        calibrated(tokens(1), qpass.Recipe(SCHEME, algorithms=[{"gptq": {"targets": ["nowhere"]}}]))


class Gated(nn.Module):
    """Two blocks; the second runs only for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        return x + self.blocks[1](x) if x.shape[0] > 4 else x


def test_a_layer_that_no_sample_reaches() -> None:
    with pytest.raises(CalibrationError, match=r"never reached blocks\.1"):
        qpass.quantize(Gated(), GPTQ, calibration=[torch.randn(2, 32)], example_inputs=torch.randn(8, 32),
                       progress=False)
    qpass.quantize(Gated(), GPTQ, calibration=[torch.randn(8, 32)], example_inputs=torch.randn(8, 32), progress=False)


def test_activations_that_are_not_numbers() -> None:
    bad = torch.randn(8, 32)
    bad[3, 4] = torch.nan
    model = Gated()
    with pytest.raises(CalibrationError, match=r"sample 1 gives NaN or Inf at the input of blocks\.0"):
        qpass.quantize(model, GPTQ, calibration=[torch.randn(8, 32), bad], example_inputs=torch.randn(8, 32),
                       progress=False)
    assert not codes(model)


class _ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(input=x)


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_ByKeyword() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks[0](x) + self.blocks[1](x)


@pytest.mark.parametrize("algorithm", ["gptq", "autoround", "awq", "smoothquant"])
def test_inputs_of_layers_called_by_keyword_are_rounded_too(algorithm: str) -> None:
    torch.manual_seed(0)
    reference = _Blocks().eval()
    data = [torch.randn(256, 64) for _ in range(2)]
    model = qpass.quantize(copy.deepcopy(reference), qpass.Recipe("w8a8", ignore=[], algorithms=[algorithm]),
                           example_inputs=data[0], calibration=data, progress=False)
    assert (model(data[0]) - reference(data[0])).abs().max() < 0.05


@pytest.mark.parametrize(("algorithm", "data"), [("scales", None), ("gptq", tokens(2))])
def test_a_tied_head_is_calibrated_once_and_its_table_reads_it(algorithm: str, data: list[Tensor] | None) -> None:
    model, ids = small_model("gpt2"), tokens(1)[0]
    wanted = output_of(model, ids)
    qpass.quantize(model, {"scheme": "w8a16", "overrides": {"lm_head": "w8a16"}, "algorithms": [algorithm]},
                   calibration=data, progress=False)
    rows = [row for row in qpass.explain(model).rows if row.status == "quantized"]
    assert {"transformer.wte.weight", "lm_head.weight"} & {row.name for row in rows}
    assert "transformer.wte.weight" not in dict(model.named_parameters())  # no float copy is left
    torch.testing.assert_close(output_of(model, ids), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
