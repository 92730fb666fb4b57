"""Model of PyTorch: serves one whole model, float or quantized by qpass, to the coordinator, a JSON line at a time.

usage: python tests/bench/model_torch.py FOLDER     a float model, or one that qpass saved

    {"do": "hello"}                           -> {"versions": {...}}
    {"do": "load"}                            -> {"seconds": S, "peak": BYTES, "weights": BYTES}
    {"do": "prefill", "tokens": T}            -> {"us": [one prompt of T tokens]}
    {"do": "decode", "batch": B, "tokens": N} -> {"us": [each step, all sequences]}      a loop over compiled steps
    {"do": "generate", "tokens": N}           -> {"us": [a step]}                        through generate()
    {"do": "compile"}                         -> {"us": [the first compiled step]}
"""

from __future__ import annotations

import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from worker import answer_lines

import qpass
from qpass.bench.measurements import generate_times, loaded, peak_bytes
from qpass.checkpoints.model_folder import is_quantized, load_float
from qpass.demo.measurements import compile_decoding

CONTEXT, LONGEST = 128, 704
"""Tokens that a sequence has when decoding is timed, and at most."""
COMPILE: dict[str, Any] = {
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,  # nobody changes the modules meanwhile
    "cpp_wrapper": True,  # calls between loops and products in C++; in Python they are 5 % of a token
    "size_asserts": False, "alignment_asserts": False,
    "cpp.min_chunk_size": 16384}  # numbers that are worth a thread in Inductor's own loops; 512 of them are not
"""Of torch.compile, float and quantized: what anybody may ask for whose model stays as it is."""


class Model:
    """The model, its caches, and a compiled step for each shape."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.float = folder, not is_quantized(folder)
        self.model: Any = None

    def load(self) -> dict[str, Any]:
        self.model, took = loaded(lambda: load_float(self.folder) if self.float else qpass.load(self.folder))
        self.model(torch.tensor([[3]]))  # as llama.cpp's memory is measured: with a token made
        return {"seconds": took.seconds, "peak": peak_bytes(), "weights": took.weights}

    @lru_cache(maxsize=4)  # noqa: B019
    def cache(self, batch: int) -> Any:
        config = self.model.config
        made = transformers.StaticCache(config=config, max_cache_len=LONGEST)
        made.early_initialization(batch, config.num_key_value_heads, config.head_dim, self.model.dtype,
                                  torch.device("cpu"))
        return made

    @lru_cache(maxsize=4)  # noqa: B019
    def step(self, batch: int, tokens: int) -> Any:
        """Compiled for one shape."""
        return torch.compile(self.model, dynamic=False, options=COMPILE)

    def run(self, step: Any, ids: torch.Tensor, at: int) -> tuple[torch.Tensor, float]:
        """The next tokens [B, 1] of sequences that hold `at` tokens, and microseconds. What they hold is zeros."""
        batch, tokens = ids.shape
        cache = self.cache(batch)
        for layer in cache.layers:
            layer.cumulative_length.fill_(at)
        start = time.perf_counter()
        out = step(input_ids=ids, past_key_values=cache, position_ids=torch.arange(at, at + tokens)[None],
                   logits_to_keep=1)
        took = (time.perf_counter() - start) * 1e6  # choosing a token is not in it: llama-bench and OpenVINO do not
        return out.logits[:, -1:].argmax(-1), took

    def prefill(self, tokens: int) -> list[float]:
        """The float model eagerly: a product that takes seconds gains nothing from a compiler."""
        ids = torch.randint(3, self.model.config.vocab_size, (1, tokens))
        return [self.run(self.model if self.float else self.step(1, tokens), ids, 0)[1]]

    def decode(self, batch: int, tokens: int) -> list[float]:
        ids, spans = torch.randint(3, self.model.config.vocab_size, (batch, 1)), []
        for at in range(CONTEXT, CONTEXT + tokens):
            ids, us = self.run(self.step(batch, 1), ids, at)
            spans.append(us)
        return spans

    def generate(self, tokens: int) -> list[float]:
        compile_decoding(self.model, COMPILE)
        return [generate_times(self.model, 16, tokens, 1)[1] * 1e6]

    @torch.inference_mode()
    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["do"] == "hello":
            return {"versions": {"PyTorch": torch.__version__, "Transformers": transformers.__version__}}
        if asked["do"] == "load":
            return self.load()
        if asked["do"] == "prefill":
            return {"us": self.prefill(asked["tokens"])}
        if asked["do"] == "decode":
            return {"us": self.decode(asked["batch"], asked["tokens"])}
        if asked["do"] == "generate":
            return {"us": self.generate(asked["tokens"])}
        return {"us": self.decode(1, 1)}


if __name__ == "__main__":
    answer_lines(Model(Path(sys.argv[1])).answer)
