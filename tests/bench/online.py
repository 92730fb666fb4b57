"""Online: new weights put into a quantized model, and decoding over a quantized cache, beside a copy and a float cache.

usage: python tests/bench/run.py --only online

`update` of three bfloat16 weights is timed in turn with copying the same bytes. Decoding is of models of SmolLM2's
shapes with random weights and W4A8 products, 4 of their 30 layers and as much of their vocabulary, compiled: 16
sequences of 4096 tokens each, which are there from the beginning. One step with each cache after the other. Best of
all turns for `update`, medians for decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tables import aligned
from torch import nn

import qpass

PRESETS = ("w4a16", "w4a8", "w4a16_asym", "w4a8_channel", "w8a16", "w8a8", "w3a16", "w6a8", "nf4", "fp4",
           "fp8_per_tensor", "fp8_dynamic", "fp8_block", "mxfp4", "mxfp6a8", "mxfp8", "nvfp4")
SHAPES = ((5632, 2048), (2048, 5632), (5632, 2048))
UPDATE_GOAL, CACHE_GOAL = 0.5, 1.3
"""Of the speed of the copy; of the speed with a bfloat16 cache, for 8 bits."""
FLOAT, EIGHT_BITS, CACHES = "bf16", ("int8", "fp8"), ("bf16", "int8", "fp8", "int4")
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 6560, "max_position_embeddings": 8192}


@dataclass
class Online:
    """Milliseconds: of an update, of one without its look for NaN before, and of the copy, by preset; of a step of
    decoding, by cache; or why there are none."""

    updates: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)


def run(threads: int, presets: Sequence[str] = PRESETS, caches: Sequence[str] = CACHES,
        shapes: Sequence[tuple[int, int]] = SHAPES, sizes: Mapping[str, int] = SMOL, batch: int = 16,
        tokens: int = 4096, turns: int = 9) -> Online:
    """Measure all of it in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    made = Online()
    weights = {f"{i}.weight": torch.randn(shape).mul_(0.02).bfloat16() for i, shape in enumerate(shapes)}
    for preset in presets:
        try:
            made.updates[preset] = update_times(weights, preset, turns)
        except qpass.QPassError as why:
            made.why_not[preset] = str(why)
    steps = {kind: decoding(kind, sizes, batch, tokens, turns + 2) for kind in caches}
    spans: dict[str, list[float]] = {kind: [] for kind in caches}
    for turn in range(turns + 2):
        for kind, step in steps.items():
            span = _ms(step)
            spans[kind] += [span] if turn > 1 else []  # what compiles and what warms is not timed
    made.steps = {kind: statistics.median(found) for kind, found in spans.items()}
    return made


def update_times(weights: Mapping[str, torch.Tensor], preset: str, turns: int) -> tuple[float, float, float]:
    """Milliseconds of an update of layers with these weights, without the look before too, and of a copy of them."""
    layers = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights.values()))
    layers.load_state_dict(dict(weights))
    first = torch.zeros(1, next(iter(weights.values())).shape[1], dtype=torch.bfloat16)
    model = qpass.quantize(layers, qpass.Recipe(preset, ignore=[]), progress=False, example_inputs=first)
    copies = [torch.empty_like(w) for w in weights.values()]

    def copy() -> None:
        for target, weight in zip(copies, weights.values(), strict=True):
            target.copy_(weight)

    copy()
    qpass.update(model, weights)
    calls = (lambda: qpass.update(model, weights), lambda: qpass.update(model, weights, check_first=False), copy)
    spans = [[_ms(call) for call in calls] for _ in range(turns)]
    safe, quick, copied = (min(column) for column in zip(*spans, strict=True))
    return safe, quick, copied


def decoding(kind: str, sizes: Mapping[str, int], batch: int, tokens: int, steps: int) -> Callable[[], None]:
    """A call that decodes the next token of sequences which hold `tokens`."""
    from model_torch import COMPILE
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    qpass.quantize(model, qpass.Recipe("w4a8", ignore=[], on_indivisible="adjust"), progress=False)
    places = tokens + steps + 8
    cache: Any = (StaticCache(config=config, max_cache_len=places) if kind == FLOAT else
                  qpass.QuantizedCache(model, kind, max_cache_len=places))
    shape = (batch, sizes["num_key_value_heads"], tokens, sizes["head_dim"])
    for layer in range(sizes["num_hidden_layers"]):
        cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)
    step, ids, at = torch.compile(model, dynamic=False, options=COMPILE), torch.full((batch, 1), 3), [tokens]

    @torch.inference_mode()
    def following() -> None:
        step(input_ids=ids, past_key_values=cache, position_ids=torch.full((1, 1), at[0]))
        at[0] += 1

    return following


def _ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def goals(made: Online) -> list[dict[str, Any]]:
    """What is to be reached: each with how many times the speed it is, and whether that is enough."""
    found = [("update " + preset, "copy", UPDATE_GOAL, copied / quick)
             for preset, (_, quick, copied) in made.updates.items()]
    found += [(f"decode, batch 16, 4k, {kind} cache", "bf16 cache", CACHE_GOAL, made.steps[FLOAT] / made.steps[kind])
              for kind in EIGHT_BITS if kind in made.steps and FLOAT in made.steps]
    return [{"text": text, "beside": beside, "goal": goal, "value": value, "reached": value >= goal}
            for text, beside, goal, value in found]


def text(made: Online) -> str:
    """A table of each, and the goals that are missed."""
    updates = [["update of", "ms", "check_first=False", "copy, ms", "speed of the copy", "check_first=False"]]
    updates += [[preset, *(f"{ms:.1f}" for ms in (safe, quick, copied)), f"{copied / safe:.2f}x",
                 f"{copied / quick:.2f}x"] for preset, (safe, quick, copied) in made.updates.items()]
    steps = [["cache, 16 sequences of 4096 tokens", "ms a step", "speed of bf16"]]
    steps += [[kind, f"{ms:.1f}", f"{made.steps[FLOAT] / ms:.2f}x"] for kind, ms in made.steps.items()]
    all_goals = goals(made)
    missed = [f"{goal['text']} {goal['value']:.2f}x of {goal['goal']}" for goal in all_goals if not goal["reached"]]
    said = [f"{len(all_goals) - len(missed)} of {len(all_goals)} goals reached" + ("; missed: " if missed else ""),
            *missed, *(f"{preset}: {why}" for preset, why in made.why_not.items())]
    return "\n\n".join((aligned(updates), aligned(steps), "\n".join(said)))


def as_data(made: Online) -> dict[str, Any]:
    """What is kept as JSON."""
    return {**asdict(made), "goals": goals(made)}
