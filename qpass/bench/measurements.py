"""Bench measurements: a model in, its seconds, tokens a second and bytes out."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpass.demo.measurements import compile_decoding, give_back_freed, process_bytes, stop_compiling, weight_bytes

_SLOW_S = 20.0
_PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """What it took to have the model ready: seconds, and bytes of its weights.

    added, peak_added  by how much the process grew, and had grown at the worst moment; None where nobody counts it
    """

    seconds: float
    weights: int
    added: int | None
    peak_added: int | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second through generate(): of the prompt, and of each sequence's answer times the sequences.

    `prompt` is how many tokens the prompt had: fewer than asked for where they would have taken too long.
    """

    prefill: float
    decode: float
    prompt: int
    compile_s: float | None


def loaded(load: Callable[[], Any]) -> tuple[Any, Load]:
    """Run `load`, and what it took; memory of earlier models is given back first."""
    gc.collect()
    give_back_freed()
    _forget_peak()
    before = process_bytes()
    began = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - began
    gc.collect()
    peak = peak_bytes()
    give_back_freed()
    after = process_bytes()
    grown = [None if before is None or now is None else max(0, now - before) for now in (after, peak)]
    return model, Load(seconds=seconds, weights=weight_bytes(model), added=grown[0], peak_added=grown[1])


def speed(model: Any, *, prompt: int, new: int, batch: int, compiled: bool, repeats: int = 3) -> Speed:
    """Time generate() on random ids, greedy, with a static cache; the decoding step compiled if asked for."""
    # The second: the first call imports and warms what later ones find ready.
    probe = [generate_times(model, _PROBE_TOKENS, 2, batch)[0] for _ in range(2)][1]
    if probe * prompt / _PROBE_TOKENS > _SLOW_S:
        prompt = max(_PROBE_TOKENS, int(_PROBE_TOKENS * _SLOW_S / probe))
    compile_s = None
    try:
        if compiled:
            compile_decoding(model)
        began = time.perf_counter()
        generate_times(model, prompt, new, batch)
        compile_s = time.perf_counter() - began if compiled else None
        runs = [generate_times(model, prompt, new, batch) for _ in range(repeats)]
    finally:
        stop_compiling(model)
    first, step = (statistics.median(run[i] for run in runs) for i in (0, 1))
    return Speed(prefill=batch * prompt / first, decode=batch / step, prompt=prompt, compile_s=compile_s)


class _Arrivals:
    """A streamer that notes when tokens arrive; generate hands over the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_times(model: Any, prompt: int, new: int, batch: int) -> tuple[float, float]:
    """Seconds until the first token of `new`, and the median seconds of a later one; random ids, greedy."""
    draw = torch.Generator().manual_seed(prompt)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=draw)
    arrivals = _Arrivals()
    began = time.perf_counter()
    with _without_end(model.generation_config):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                       cache_implementation="static", streamer=arrivals, pad_token_id=0)
    later = [b - a for a, b in zip(arrivals.times[1:], arrivals.times[2:], strict=False)]
    return arrivals.times[1] - began, statistics.median(later)


@contextlib.contextmanager
def _without_end(config: Any) -> Iterator[None]:
    """No token ends an answer: `min_new_tokens` would look for the end in all logits, 1.3 ms a token."""
    ends, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = ends


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # Linux; elsewhere the peak is unknown
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """The most memory this process has had in use since the last `loaded` began; None where nobody counts it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
