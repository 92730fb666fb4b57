"""Demo: a recipe and a prompt in; a language model is quantized, compiled, answers, and is measured against itself."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qpass
from qpass.checkpoints.model_folder import load_float
from qpass.demo.language_model import NAME, cache_folder, demo_model
from qpass.demo.measurements import (
    Column,
    answer,
    compile_decoding,
    give_back_freed,
    measured,
    results_table,
    stop_compiling,
    weight_bytes,
)
from qpass.evaluate_model import Evaluation
from qpass.recipes.recipe import Recipe
from qpass.recipes.recipe_files import as_recipe

WINDOW = 256
TEXT = Path(__file__).parents[1] / "data" / "persuasion.txt"


def run(recipe: Any = "w4a8", *, prompt: str, cache: str | Path | None = None,
        tokens: int = 1024, new_tokens: int = 64, moe: bool = False) -> None:
    """Print each step as it is done; raises what its steps raise. `new_tokens` limits the answers; `moe` takes the
    model's copy as a mixture of experts."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)

    chosen = as_recipe(recipe)
    label = chosen.scheme.name if chosen.scheme else "recipe"
    folder = demo_model(cache_folder(cache), say)
    if moe:
        from qpass.demo.mixture import moe_model

        folder = moe_model(folder, cache_folder(cache), say)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_float(folder)
    say(f"bf16: answering {prompt!r}, 8 tokens of it, to see how fast that is without quantization")
    answer(model, tokenizer, prompt, new_tokens=2)
    columns = [measured("bf16, eager", model, answer(model, tokenizer, prompt, new_tokens=8))]

    say(f"plan for {label} (this much needs no weights)")
    print(f"\n{qpass.plan(model, chosen)}\n", flush=True)
    say(f"quantizing to {label}")
    _swap(model, chosen)
    say(f"{label}: answering without torch.compile")
    answer(model, tokenizer, prompt, new_tokens=2)
    columns.append(measured(f"{label}, eager", model, answer(model, tokenizer, prompt, new_tokens=8)))

    say("compiling the decoding step (torch.compile; the one slow step, its result is cached on disk)")
    compile_decoding(model)
    started = time.perf_counter()
    answer(model, tokenizer, prompt, new_tokens=new_tokens, at_most=3)
    say(f"compiled in {time.perf_counter() - started:.0f} s; the answer of the {label} model:")
    print(f"\n  user       {prompt}\n  assistant  ", end="", flush=True)
    columns.append(measured(f"{label}, compiled", model, answer(model, tokenizer, prompt, new_tokens=new_tokens,
                                                                stream=sys.stdout)))
    print("\n", flush=True)

    report = qpass.explain(model)
    stop_compiling(model)
    reference, arithmetic = _reference(folder)

    def accuracy(of: nn.Module) -> Evaluation:
        return qpass.evaluate(of, TEXT, reference, tokenizer=tokenizer, window=WINDOW, tokens=tokens,
                              progress=sys.stderr.isatty())

    say(f"evaluating both on {tokens:,} tokens of Jane Austen's Persuasion, in windows of {WINDOW}")
    columns[1] = replace(columns[1], accuracy=accuracy(model))
    if not moe and chosen.scheme and chosen.scheme.weight.type == "int" and not chosen.algorithms:
        say(f"{label} once more, its scales searched for, which needs no data: algorithms=[\"scales\"]")
        model = load_float(folder)
        _swap(model, Recipe.from_dict({**chosen.to_dict(), "algorithms": ["scales"]}))
        columns.append(Column(label=f"{label}, scales", weights=weight_bytes(model), accuracy=accuracy(model)))
    print("\n" + results_table(NAME, columns, arithmetic) + "\n", flush=True)
    print(report, flush=True)
    say("done")


def _swap(model: nn.Module, recipe: Any) -> None:
    qpass.quantize(model, recipe)
    gc.collect()
    give_back_freed()


def _reference(folder: Path) -> tuple[nn.Module, str]:
    """The bf16 model once more, and the arithmetic it computes in: float32 where bf16 has no instructions."""
    reference: nn.Module = load_float(folder)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return reference, "bf16"
    return reference.float(), "float32"


