"""evaluate: against a plain loop in float64, on windows of every kind, and with inputs that cannot be evaluated."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import EvaluationError
from qpass.measure.token_windows import windows_of

IDS = torch.randint(3, 128, (101,), generator=torch.Generator().manual_seed(5))


class Bigram(nn.Module):
    """Logits of the next token from this token alone, so that windows cannot matter."""

    def __init__(self, vocabulary: int = 128, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=draw))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class Letters:
    """A tokenizer: one token a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [min(ord(c), 127) for c in text]}


def expected(model: nn.Module, reference: nn.Module, ids: Tensor) -> tuple[float, float, float]:
    ours = model(ids[None]).double().log_softmax(-1)[0, :-1]
    theirs = reference(ids[None]).double().log_softmax(-1)[0, :-1]
    loss = -ours.gather(1, ids[1:, None]).mean()
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return loss.exp().item(), kl.item(), (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()


@pytest.mark.parametrize(("window", "stride"), [(512, None), (100, 100), (16, 16), (16, 5), (7, 1), (1, 1)])
def test_every_token_counts_once_whatever_the_windows(window: int, stride: int | None) -> None:
    one, two = Bigram(seed=1), Bigram(seed=2)
    got = qpass.evaluate(one, IDS, two, window=window, stride=stride)
    perplexity, kl, agreement = expected(one, two, IDS)
    assert got.tokens == 100
    assert got.perplexity == pytest.approx(perplexity, rel=1e-6)
    assert got.kl == pytest.approx(kl, rel=1e-5)
    assert got.top1_agreement == pytest.approx(agreement)


def test_windows_give_the_context_they_promise() -> None:
    pieces = windows_of([torch.arange(11)], 4, 2, None)
    assert [(p.ids.tolist(), p.targets[p.skip:].tolist()) for p in pieces] == [
        ([0, 1, 2, 3], [1, 2, 3, 4]), ([2, 3, 4, 5], [5, 6]), ([4, 5, 6, 7], [7, 8]), ([6, 7, 8, 9], [9, 10])]


def test_context_lowers_nothing_but_is_used(tiny_llama: Any) -> None:
    model = tiny_llama()
    narrow, wide = (qpass.evaluate(model, IDS, window=16, stride=s) for s in (16, 4))
    ids, loss = IDS, 0.0
    with torch.no_grad():
        for start in range(0, 100, 16):
            logits = model(ids[None, start:min(start + 16, 100)]).logits[0].double()
            loss += float(nn.functional.cross_entropy(logits, ids[start + 1:start + 1 + len(logits)], reduction="sum"))
    assert narrow.loss == pytest.approx(loss / 100, rel=1e-6)
    assert wide.loss != narrow.loss


def test_a_model_compared_with_itself_shows_no_distance(tiny_llama: Any) -> None:
    model = tiny_llama()
    got = qpass.evaluate(model, IDS, model, window=32)
    assert (got.kl, got.kl_stderr, got.loss_increase, got.loss_increase_stderr) == (0, 0, 0, 0)
    assert got.top1_agreement == 1 and got.perplexity == got.reference_perplexity


def test_coarser_schemes_are_farther_away(tiny_llama: Any) -> None:
    reference = tiny_llama(dtype=torch.float32)
    results = [qpass.evaluate(qpass.quantize(copy.deepcopy(reference), name, progress=False), IDS, reference, window=32)
               for name in ("w8a8", "w4a8_channel", "w2a16")]
    distances = [r.kl for r in results]
    assert 0 < distances[0] < distances[1] < distances[2]
    again = qpass.evaluate(qpass.quantize(copy.deepcopy(reference), "w8a8", progress=False), IDS, reference, window=32)
    assert again == results[0]


def test_standard_error_is_that_of_the_window_means() -> None:
    one, two = Bigram(seed=1), Bigram(seed=2)
    parts = [qpass.evaluate(one, IDS[start:start + 11], two) for start in range(0, 100, 10)]
    whole = qpass.evaluate(one, IDS, two, window=10)
    for name in ("kl", "loss_increase"):
        means = torch.tensor([getattr(p, name) for p in parts], dtype=torch.float64)
        assert getattr(whole, f"{name}_stderr") == pytest.approx(float(means.std() / len(means) ** 0.5), rel=1e-6)
    assert parts[0].kl_stderr is None and "one window" in str(parts[0])


def test_text_file_and_ids_are_the_same(tmp_path: Path) -> None:
    text = "It is a truth universally acknowledged.\nSo it is."
    file = tmp_path / "text.txt"
    file.write_text(text)
    model, letters = Bigram(), Letters()
    ids = letters(text)["input_ids"]
    sources = (text, str(file), file, ids, torch.tensor(ids), {"input_ids": [ids]})
    results = [qpass.evaluate(model, source, tokenizer=letters) for source in sources]
    assert all(r == results[0] for r in results) and results[0].tokens == len(text) - 1


def test_rows_of_ids_are_texts_of_their_own() -> None:
    model = Bigram()
    rows = qpass.evaluate(model, IDS[:100].view(4, 25), window=10)
    assert rows.tokens == 4 * 24 and rows.windows == 4 * 3


def test_a_number_of_tokens_is_reached_in_whole_windows() -> None:
    got = qpass.evaluate(Bigram(), IDS, window=16, tokens=40)
    assert (got.tokens, got.windows) == (48, 3)


def test_models_stay_as_they_are(tiny_llama: Any) -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    in_eval = qpass.evaluate(copy.deepcopy(model).eval(), IDS)
    assert qpass.evaluate(model, IDS) == in_eval
    assert [m.training for m in model.modules()] == before and all(p.grad is None for p in model.parameters())


def test_result_is_frozen_and_its_text_aligned() -> None:
    got = qpass.evaluate(Bigram(seed=1), IDS, Bigram(seed=2), window=10)
    with pytest.raises(FrozenInstanceError):
        got.kl = 0.0  # type: ignore[misc]
    lines = str(got).splitlines()
    assert lines[0] == "tokens                  100 in 10 windows of 10 (stride 10)"
    assert all(line[23] == " " and line[24] != " " for line in lines) and max(map(len, lines)) < 100
    assert "±" in lines[3] and lines[-1].startswith("same top-1 token")


@pytest.mark.parametrize(("source", "options", "says"), [
    (IDS[:1], {}, "1 tokens; at least 2"),
    ([], {}, "0 tokens"),
    (IDS, {"tokens": 1000}, "has 100 tokens to score and 1,000 were asked for"),
    (IDS, {"window": 8, "stride": 9}, "stride 1 to window"),
    (IDS, {"window": 0}, "window must be positive"),
    (IDS.float(), {}, "must be integers"),
    (IDS + 100, {}, "ids run from"),
    ("no/such/file.txt", {}, "there is no file no/such/file.txt"),
    (Path("nothing"), {}, "there is no file nothing"),
    ("Some prose, in a line.", {}, "pass tokenizer=..."),
    ("Some prose, in a line.", {"tokenizer": "/no/such/folder"}, "no tokenizer could be loaded"),
])
def test_what_cannot_be_evaluated_is_said(tiny_llama: Any, source: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        qpass.evaluate(tiny_llama(), source, **options)


def test_models_must_share_a_vocabulary_and_hold_numbers(tiny_model: Any) -> None:
    with pytest.raises(EvaluationError, match="vocabulary of 128 and the reference one of 160"):
        qpass.evaluate(tiny_model("llama"), IDS, tiny_model("llama", vocab_size=160))
    with pytest.raises(EvaluationError, match="meta device"):
        qpass.evaluate(tiny_model("llama", device="meta"), IDS)
    with pytest.raises(EvaluationError, match="causal language models"):
        qpass.evaluate(Pooled(), IDS)


class Pooled(nn.Module):
    """Gives one vector a text, as an encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).mean(1)
