"""Bench a model: a folder and recipes in, speed, memory and accuracy of each beside the float model out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qpass
from qpass.bench.candidates import candidates
from qpass.bench.measurements import Load, Speed, loaded, speed
from qpass.checkpoints.model_folder import check_folder, is_quantized, load_float, load_meta
from qpass.errors import CheckpointError, QPassError
from qpass.evaluate_model import Evaluation

TEXT = Path(__file__).parents[1] / "data" / "persuasion.txt"
WINDOW = 256
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One recipe, or the float model (`accuracy` None): what was measured, or in `failed` why it could not be."""

    label: str
    load: Load | None = None
    speed: Speed | None = None
    accuracy: Evaluation | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """All of one run. The first of `rows` is the float model as it is stored.

    arithmetic  the dtype in which the float model computed the distributions that accuracy is measured from
    """

    source: str
    rows: tuple[Measured, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    threads: int
    batch: int
    tokens: int
    compiled: bool
    arithmetic: str


def bench_model(source: str | Path, recipes: Sequence[Any] | None = None, *, text: str | Path = TEXT,
                tokens: int = 1024, prompt: int = 128, new: int = 32, batch: int = 1, compiled: bool = True,
                say: Say = lambda text: None) -> ModelBench:
    """Measure the float model in `source` and the same model under each recipe, one after the other in this process.

    recipes  what `quantize` takes; None for each preset that has kernels here for all of its layers
    text     scored for accuracy, at least `tokens` of it, by KL(float || quantized) and top-1 agreement
    prompt, new, batch  what generate() is timed on: tokens read, tokens made, sequences at once
    compiled whether the decoding step goes through torch.compile
    say      is told what is being done

    A recipe that fails is a row that says why; raises QPassError if the model itself cannot be used.
    """
    folder = check_folder(source)
    if is_quantized(folder):
        raise CheckpointError(f"the model in {folder} is quantized already; bench compares recipes on the float model")
    found = candidates(folder, recipes)
    how: dict[str, Any] = {"prompt": prompt, "new": new, "batch": batch, "compiled": compiled}
    rows = [_timed(_SHORT.get(load_meta(folder).dtype, "float"), lambda: load_float(folder), say, **how)]
    if rows[0].failed is not None:
        raise QPassError(f"the float model in {folder} cannot be measured: {rows[0].failed}")
    for label, recipe in found.chosen.items():
        rows.append(_timed(label, _quantized(folder, recipe), say, **how))
    reference, arithmetic = exact_float(folder)
    rows = [rows[0], *(_scored(row, _quantized(folder, found.chosen[row.label]), reference, folder, text, tokens, say)
                       for row in rows[1:])]
    return ModelBench(source=str(folder), rows=tuple(rows), skipped=found.skipped, threads=torch.get_num_threads(),
                      batch=batch, tokens=tokens, compiled=compiled, arithmetic=arithmetic)


def exact_float(folder: Path) -> tuple[Any, str]:
    """The float model to measure distances from, and its arithmetic: float32 where bf16 has no instructions."""
    reference = load_float(folder)
    if reference.dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return reference, str(reference.dtype).removeprefix("torch.")
    return reference.float(), "float32"


def _quantized(folder: Path, recipe: Any) -> Callable[[], Any]:
    return lambda: qpass.load(folder, recipe)


def _timed(label: str, load: Callable[[], Any], say: Say, *, prompt: int, new: int, batch: int,
           compiled: bool) -> Measured:
    say(f"{label}: loading, then generate() with a prompt of {prompt} tokens")
    try:
        model, took = loaded(load)
        return Measured(label=label, load=took,
                        speed=speed(model, prompt=prompt, new=new, batch=batch, compiled=compiled))
    except Exception as error:
        return Measured(label=label, failed=_reason(error))
    finally:
        torch.compiler.reset()


def _scored(row: Measured, load: Callable[[], Any], reference: Any, folder: Path, text: str | Path, tokens: int,
            say: Say) -> Measured:
    if row.failed is not None:
        return row
    say(f"{row.label}: {tokens:,} tokens of text beside the float model")
    try:
        accuracy = qpass.evaluate(load(), text, reference, tokenizer=str(folder), window=WINDOW, tokens=tokens)
    except QPassError as error:
        return Measured(label=row.label, load=row.load, speed=row.speed, failed=_reason(error))
    return Measured(label=row.label, load=row.load, speed=row.speed, accuracy=accuracy)


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, QPassError) else f"{type(error).__name__}: {first}"
