"""Model: whole models of Llama-3.2-1B's shapes, each library's side by side: speed, memory, quantization, compilation.

usage: python tests/bench/run.py --only model
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llama_bench import LlamaBench
from peers import HERE, PEERS, Found
from turns import Take, Timing, Worker, WorkerDied, take_turns_quietly

METRICS: dict[str, dict[str, Any]] = {
    "decode, batch 1": {"do": "decode", "batch": 1, "tokens": 12},
    "decode, batch 16": {"do": "decode", "batch": 16, "tokens": 4},
    "generate(), batch 1": {"do": "generate", "tokens": 12},
    "prefill": {"do": "prefill", "tokens": 512}}
GENERATE = ("qpass w4a8", "qpass w8a8", "torch bf16")
FLOAT_PREFILL = 32
"""Tokens of the float model's prompt: processors without bfloat16 instructions take seconds for them."""
SLOW_S, PATIENCE_S = 20.0, 60.0
"""A peer that takes longer than the first for its first call is not called again (ours compile at theirs), and one that
has no answer after the second is given up: vLLM's W8A8 takes minutes where oneDNN has only its reference code."""


@dataclass
class Outcome:
    """What was measured of one model: tokens a second by metric, bytes after loading, and why something is missing."""

    label: str
    timings: dict[str, Timing] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    peak: int | None = None
    load_s: float | None = None
    why_not: str | None = None

    def rate(self, metric: str) -> float | None:
        """Tokens a second; None if it was not measured."""
        timing = self.timings.get(metric)
        return None if timing is None or not timing.median_us else self.tokens[metric] / timing.median_us * 1e6


@dataclass
class Models:
    """All of one run."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    quantize_s: dict[str, float | str] = field(default_factory=dict)
    compile_s: dict[str, float | str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)


def run(found: Found, threads: int, cache: Path, only: Sequence[str] = (),
        keep: Callable[[Models], object] = lambda made: None) -> Models:
    """Make what is not made yet, then measure everything, or the speed of some models only; `keep` is shown what is
    there after every step, so that a run that is stopped loses one step."""
    cache.mkdir(parents=True, exist_ok=True)
    float_folder = cache / "llama-1b"
    gguf = cache / "llama-1b-bf16.gguf"
    _script("make_model.py", str(float_folder), *(["--gguf", str(gguf)] if "llama.cpp" in found.commands else []))
    made = Models()
    if not only:
        _quantize(made, found, float_folder)
        keep(made)
    for recipe in ("w4a8", "w8a8"):
        if f"qpass {recipe}" in only and not _quantized(float_folder, recipe).exists():
            _save_quantized(float_folder, recipe)
    workers, askers = _workers(made, found, threads, cache, float_folder, gguf, only)
    try:
        _measure(made, workers, askers, keep)
    finally:
        for worker in workers.values():
            worker.close()
    if not only:
        _compile(made, threads, {"torch bf16": float_folder, "qpass w4a8": cache / "llama-1b-w4a8"}, keep)
    return made


def _quantize(made: Models, found: Found, folder: Path) -> None:
    """Seconds of each library's own call. What is loaded later has its head quantized, as the peers' models have."""
    for recipe in ("w4a8", "w8a8"):
        shutil.rmtree(_quantized(folder, recipe), ignore_errors=True)
        made.quantize_s[f"qpass {recipe}"] = _seconds([sys.executable], "qpass", folder, "--recipe", recipe)
        made.quantize_s[f"qpass {recipe}, head too"] = _save_quantized(folder, recipe)
        made.quantize_s[f"torchao {recipe}"] = _seconds([sys.executable], "torchao", folder, "--recipe", recipe)
    compressor = found.commands.get("LLM Compressor")
    made.quantize_s["LLM Compressor w4a8"] = found.missing["LLM Compressor"] if compressor is None else _seconds(
        compressor[:1], "llmcompressor", folder, "--recipe", "w4a8")


def _quantized(folder: Path, recipe: str) -> Path:
    return folder.with_name(f"{folder.name}-{recipe}")


def _save_quantized(folder: Path, recipe: str) -> float | str:
    return _seconds([sys.executable], "qpass", folder, "--recipe", recipe, "--head", recipe, "--save",
                    str(_quantized(folder, recipe)))


def _seconds(python: list[str], library: str, folder: Path, *more: str) -> float | str:
    done = subprocess.run([*python, str(HERE / "model_quantize.py"), library, str(folder), *more], text=True,
                          capture_output=True, check=False)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["ended without a word"])[-1][:200]
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _workers(made: Models, found: Found, threads: int, cache: Path, folder: Path, gguf: Path,
             only: Sequence[str]) -> tuple[dict[str, Worker], dict[str, Any]]:
    """Every model, loaded: workers by label, and by label what answers requests."""
    commands = {f"qpass {recipe}": [sys.executable, str(HERE / "model_torch.py"), str(cache / f"llama-1b-{recipe}")]
                for recipe in ("w4a8", "w8a8")}
    commands["torch bf16"] = [sys.executable, str(HERE / "model_torch.py"), str(folder)]
    if "OpenVINO" in found.commands:
        python, converted = found.commands["OpenVINO"][0], cache / "openvino-int4"
        script = str(HERE / "model_openvino.py")
        if not (converted / "openvino_model.xml").exists():
            subprocess.run([python, script, str(converted), "--from", str(folder)], check=False, stdout=sys.stderr)
        commands["OpenVINO int4"] = [python, script, str(converted)]
    if "vLLM" in found.commands:
        commands["vLLM w8a8"] = [found.commands["vLLM"][0], str(HERE / "model_vllm.py"), str(folder)]
    workers: dict[str, Worker] = {}
    askers: dict[str, Any] = {}
    for label, command in commands.items():
        if only and label not in only:
            continue
        outcome = made.outcomes[label] = Outcome(label)
        peer = PEERS["vLLM" if label.startswith("vLLM") else "qpass"]
        worker = Worker(command, {**peer.environment(found.root, threads),
                                  "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")})
        try:
            made.versions[label] = worker.ask(do="hello")["versions"]
            _note(outcome, worker.ask(do="load"))
        except (WorkerDied, KeyError) as why:
            outcome.why_not = str(why)
            worker.close()
            continue
        workers[label], askers[label] = worker, worker.ask
    if "llama.cpp" in found.commands and found.root is not None:
        for kind in ("Q4_0", "Q8_0"):
            label = f"llama.cpp {kind}"
            if only and label not in only:
                continue
            outcome = made.outcomes[label] = Outcome(label)
            bench = LlamaBench(found.root / "llamacpp" / "build" / "bin", gguf, kind, threads)
            _note(outcome, bench.ask(do="load"))
            askers[label] = bench.ask
    return workers, askers


def _note(outcome: Outcome, answer: Mapping[str, Any]) -> None:
    outcome.load_s, outcome.peak = answer.get("seconds"), answer.get("peak")
    outcome.why_not = answer.get("failed") or answer.get("refused")


def _measure(made: Models, workers: Mapping[str, Worker], askers: Mapping[str, Any],
             keep: Callable[[Models], object]) -> None:
    for metric, request in METRICS.items():
        takers: dict[str, Take] = {}
        for label, ask in askers.items():
            if made.outcomes[label].why_not or (request["do"] == "generate" and label not in GENERATE):
                continue
            mine = dict(request)
            if label == "torch bf16" or label.startswith("vLLM"):
                mine["tokens"] = FLOAT_PREFILL if request["do"] == "prefill" else 3
            began, ours = time.perf_counter(), label in GENERATE
            patience = {} if ours or label not in workers else {"limit_s": PATIENCE_S}
            try:
                answer = ask(**patience, **mine)  # compiles, and warms what it reads
            except WorkerDied as why:
                made.outcomes[label].why_not = f"{metric}: {why}"
                continue
            if "us" in answer:
                slow = not ours and time.perf_counter() - began > SLOW_S
                takers[label] = partial(_given, answer) if slow else partial(_turn, ask, mine)
                made.outcomes[label].tokens[metric] = mine["tokens"] if request["do"] == "prefill" else mine.get(
                    "batch", 1)
            else:
                made.outcomes[label].timings[metric] = Timing(why_not=answer.get("failed") or answer.get("refused"))
        timings, others = take_turns_quietly(list(workers.values()), takers, rounds=3, seconds=0.0)
        made.others[metric] = others
        for label, timing in timings.items():
            made.outcomes[label].timings[metric] = timing
        keep(made)
        print(f"  whole model: {metric}", file=sys.stderr, flush=True)


def _turn(ask: Any, request: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
    try:
        answer: Mapping[str, Any] = ask(**request)
    except WorkerDied as why:
        return {"failed": str(why)}
    return answer


def _given(answer: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
    return answer


def _compile(made: Models, threads: int, folders: Mapping[str, Path], keep: Callable[[Models], object]) -> None:
    """Seconds of the first compiled step: with an empty cache, and with the one that this left."""
    for label, folder in folders.items():
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                environment = {**PEERS["qpass"].environment(None, threads), "TORCHINDUCTOR_CACHE_DIR": cache}
                worker = Worker([sys.executable, str(HERE / "model_torch.py"), str(folder)], environment)
                try:
                    worker.ask(do="load")
                    answer = worker.ask(do="compile")
                    made.compile_s[f"{label}, {state}"] = (answer["us"][0] / 1e6 if "us" in answer else
                                                           answer.get("failed", "no answer"))
                except WorkerDied as why:
                    made.compile_s[f"{label}, {state}"] = str(why)
                finally:
                    worker.close()
                keep(made)
                print(f"  whole model: compile {label}, {state}", file=sys.stderr, flush=True)


def _script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / name), *arguments], check=True, stdout=sys.stderr,
                   env={**os.environ, "HF_HUB_OFFLINE": "1"})


