"""MoE of PyTorch: serves one mixture of experts, as model_torch.py does a dense model.

SHAPE is as make_moe.py takes it.

usage: python tests/bench/moe_torch.py SHAPE bfloat16            the float model, experts computed in the fastest way
       python tests/bench/moe_torch.py SHAPE bfloat16 FOLDER     what make_moe.py quantized
       python tests/bench/moe_torch.py SHAPE float32 FOLDER      the same with activations in float32

The float model runs eagerly, and answers with the `experts` implementation that was fastest when first asked. The
quantized one is compiled, a graph for each of the three shapes. The cache has as many places as a request needs: the
float model's attention over a static cache reads all of it.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from make_moe import float_model, shape_of
from model_torch import CONTEXT, Model
from transformers import StaticCache
from worker import answer_lines

import qpass
from qpass.bench.measurements import loaded, peak_bytes, process_bytes

PLACES = CONTEXT + 64
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class Moe(Model):
    """The model, and for each request of the float one the fastest implementation of its experts."""

    def __init__(self, shape: str, dtype: str, folder: str | None = None) -> None:
        self.folder, self.float, self.model = Path(folder or ""), folder is None, None
        self.shape, self.dtype = shape_of(shape), getattr(torch, dtype)
        self.best: dict[tuple[Any, ...], str] = {}

    def load(self) -> dict[str, Any]:
        small = float_model(replace(self.shape, layers=1, experts=2, top_k=1, ffn=64, hidden=128, vocabulary=64))
        with torch.inference_mode():  # what is loaded once belongs to no model
            (small if self.float else qpass.quantize(small, "w4a8", progress=False))(torch.tensor([[3]]))
        del small
        gc.collect()
        before = process_bytes() or 0
        self.model, took = loaded(lambda: float_model(self.shape) if self.float else qpass.load(self.folder))
        if self.dtype == torch.float32:
            self.model.float()
        with torch.inference_mode():
            self.model(torch.tensor([[3]]))
        peak = peak_bytes()
        return {"seconds": took.seconds, "peak": None if peak is None else peak - before, "weights": took.weights}

    def step(self, batch: int, tokens: int) -> Any:
        return self.model if self.float else super().step(batch, tokens)

    def cache(self, batch: int) -> Any:
        return self._cache(batch, PLACES)

    @lru_cache(maxsize=4)  # noqa: B019
    def _cache(self, batch: int, places: int) -> Any:
        config = self.model.config
        made = StaticCache(config=config, max_cache_len=places)
        made.early_initialization(batch, config.num_key_value_heads, config.head_dim, self.model.dtype,
                                  torch.device("cpu"))
        return made

    def prefill(self, tokens: int) -> list[float]:
        ids, cache = torch.randint(3, self.model.config.vocab_size, (1, tokens)), self._cache(1, tokens)
        for layer in cache.layers:
            layer.cumulative_length.fill_(0)
        step, places, start = self.step(1, tokens), torch.arange(tokens)[None], time.perf_counter()
        step(input_ids=ids, past_key_values=cache, position_ids=places, logits_to_keep=1)
        return [(time.perf_counter() - start) * 1e6]

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if not self.float or asked["do"] not in ("prefill", "decode"):
            return super().answer(asked)
        key = (asked["do"], asked.get("batch"), asked["tokens"])
        if key not in self.best:
            took = {}
            for name in IMPLEMENTATIONS:
                self.model.set_experts_implementation(name)
                took[name] = min(super().answer({**asked, "tokens": min(asked["tokens"], 8)})["us"])
            self.best[key] = min(took, key=lambda name: took[name])
        self.model.set_experts_implementation(self.best[key])
        return {**super().answer(asked), "experts": self.best[key]}


if __name__ == "__main__":
    answer_lines(Moe(*sys.argv[1:]).answer)
