"""qpass bench: a tiny model under every recipe, the table, the recommendation, and what is said of what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qpass.bench.bench_table import as_json, recommended, table
from qpass.bench.candidates import candidates
from qpass.bench.measurements import Load, Speed
from qpass.bench.run import Measured, ModelBench, bench_model
from qpass.cli import main
from qpass.errors import CheckpointError, RecipeError
from qpass.evaluate_model import Evaluation
from qpass.kernels.registry import KERNELS, load_builtin
from qpass.scheme import PRESETS


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Any) -> Path:
    """A model folder with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "model"
    tiny_llama(dtype=torch.float32).save_pretrained(path)
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(path)
    return path


def test_measures_the_float_model_and_each_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder), "--recipe", "w8a8", "w4a8", "--eager", "--tokens", "256", "--prompt", "16",
                 "--new", "4", "--json", "--kl-limit", "1e9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in found["rows"]] == ["fp32", "w8a8", "w4a8"]
    base, w8a8, w4a8 = found["rows"]
    assert base["accuracy"] is None and base["speed"]["decode"] > 0 and base["speed"]["compile_s"] is None
    assert all(row["load"]["peak_added"] >= row["load"]["added"] >= 0 for row in found["rows"])
    assert w4a8["load"]["weights"] < w8a8["load"]["weights"] < base["load"]["weights"]
    assert 0 < w8a8["accuracy"]["kl"] < w4a8["accuracy"]["kl"] and w8a8["accuracy"]["tokens"] >= 256
    assert found["recommended"] in {"fp32", "w8a8", "w4a8"} and found["batch"] == 1


def test_without_recipes_it_tries_what_has_kernels_here(folder: Path) -> None:
    found = candidates(folder, None)
    assert set(found.chosen) | set(found.skipped) == set(PRESETS) and not set(found.chosen) & set(found.skipped)
    assert "same numbers as w8a8" in found.skipped["int8"]
    load_builtin()
    fast = [kernel for kernel in KERNELS.values() if kernel.op == "linear" and kernel.priority > 0]
    assert all(any(kernel.serves(PRESETS[name].family) for kernel in fast) for name in found.chosen)
    assert "would run as w3a16 here" in found.skipped["w3a4"]


def test_a_recipe_that_fails_is_a_row(folder: Path) -> None:
    from qpass.recipes.recipe import Recipe

    found = bench_model(folder, [Recipe("w8a8", ignore=["*no_such_layer*"])], tokens=64, prompt=8, new=3,
                        compiled=False)
    assert found.rows[0].failed is None
    assert "no_such_layer" in (found.rows[1].failed or "") and found.rows[1].speed is None
    assert "no_such_layer" in table(found, kl_limit=0.1)


def test_what_cannot_be_benched_is_refused(folder: Path, tmp_path: Path) -> None:
    import qpass

    with pytest.raises(RecipeError, match="w9a9"):
        bench_model(folder, ["w9a9"])
    qpass.save(qpass.load(folder, "w8a8"), tmp_path / "quantized")
    with pytest.raises(CheckpointError, match="quantized already"):
        bench_model(tmp_path / "quantized")


def row(label: str, decode: float, kl: float | None) -> Measured:
    accuracy = None if kl is None else Evaluation(
        tokens=100, windows=4, window=25, stride=25, loss=2.0, perplexity=7.4, reference_loss=1.9,
        reference_perplexity=6.7, loss_increase=0.1, loss_increase_stderr=0.01, kl=kl, kl_stderr=0.01,
        top1_agreement=0.9)
    load = Load(seconds=1.0, weights=1000 if kl is None else 400, added=None, peak_added=None)
    return Measured(label=label, load=load, accuracy=accuracy,
                    speed=Speed(prefill=100.0, decode=decode, prompt=128, compile_s=3.0))


def bench(*rows: Measured) -> ModelBench:
    return ModelBench(source="model", rows=rows, threads=2, batch=1, tokens=100, compiled=True, arithmetic="float32")


def test_recommends_the_fastest_that_is_accurate_enough() -> None:
    found = bench(row("bf16", 10, None), row("w8a8", 20, 0.01), row("w4a8", 30, 0.4), row("w8a16", 15, 0.002))
    assert recommended(found, kl_limit=0.1).label == "w8a8"
    assert recommended(found, kl_limit=1.0).label == "w4a8"
    assert recommended(found, kl_limit=0.001).label == "bf16"
    said = table(found, kl_limit=0.1)
    assert "use w8a8 here" in said and "2.00x the float model's decoding" in said and "40% of its bytes" in said
    assert "w4a8 decodes 1.50x as fast as that, but its KL is 0.400" in said
    assert "use the float model here" in table(found, kl_limit=0.001)
    assert json.loads(as_json(found, kl_limit=0.1))["recommended"] == "w8a8"


def test_a_shorter_prompt_is_said() -> None:
    slow = row("bf16", 10, None)
    assert slow.speed is not None
    slow = replace(slow, speed=replace(slow.speed, prompt=16))
    lines = table(bench(slow, row("w8a8", 20, 0.01)), kl_limit=0.1).splitlines()
    assert "prompt of 16 tokens" in lines[2] and "prompt of 16 tokens" not in lines[3]


@pytest.mark.slow
def test_compiled(folder: Path) -> None:
    found = bench_model(folder, ["w8a8"], tokens=64, prompt=16, new=4)
    assert all(measured.speed is not None and measured.speed.compile_s for measured in found.rows)
