"""Demo measurements: a model and a prompt in, an answer with its times out; and a table of models side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from qpass.evaluate_model import Evaluation
from qpass.layers.packed_layers import PackedLayer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Generated text, seconds until its first token, and tokens a second after that (None if there was one token)."""

    text: str
    tokens: int
    first_token_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model of the table; bytes of its weights, and of the process while only it was loaded (None: unknown). What
    was not measured of it is None: its answer, its accuracy."""

    label: str
    weights: int
    process: int | None = None
    answer: Answer | None = None
    accuracy: Evaluation | None = None


class TimedStream:
    """A streamer for generate(): notes when each token arrives, and writes the text to `stream` as it comes."""

    def __init__(self, tokenizer: Any, stream: TextIO | None = None) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.times: list[float] = []
        self.ids: list[int] = []
        self.shown = ""
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.seen_prompt:  # generate hands over the prompt first
            self.seen_prompt = True
            return
        self.times.append(time.perf_counter())
        self.ids.extend(value.reshape(-1).tolist())
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        # A character of several tokens decodes to U+FFFD until its last one is there.
        if self.stream is not None and not text.endswith("\ufffd") and text.startswith(self.shown):
            self.stream.write(text[len(self.shown):])
            self.stream.flush()
            self.shown = text

    def end(self) -> None:
        if self.stream is not None:
            self.stream.write(self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.shown):])
            self.stream.flush()


def answer(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int, at_most: int | None = None,
           stream: TextIO | None = None) -> Answer:
    """The greedy answer to `prompt`. Calls with the same `new_tokens` have caches of one size and share compiled code,
    so `at_most` stops earlier without another size."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    timed = TimedStream(tokenizer, stream)
    most = new_tokens if at_most is None else at_most
    began = time.perf_counter()
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, cache_implementation="static", streamer=timed,
                   stopping_criteria=[_stop_after(inputs["input_ids"].shape[1] + most)])
    spent = timed.times[-1] - timed.times[0]
    rate = (len(timed.times) - 1) / spent if len(timed.times) > 1 else None
    return Answer(text=tokenizer.decode(timed.ids, skip_special_tokens=True), tokens=len(timed.ids),
                  first_token_s=timed.times[0] - began, tokens_per_s=rate)


def compile_decoding(model: Any, options: dict[str, Any] | None = None) -> None:
    """Let generate() compile its decoding step, as it does by itself on a GPU; the prompt stays eager. `options` are
    torch.compile's."""
    from transformers import CompileConfig

    # One shape, one graph: the static cache has a fixed size and a step has one token. torch.compile takes a mode or
    # options; without a mode its default is meant, where Transformers' would be "reduce-overhead".
    chosen = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)  # type: ignore[arg-type]
    chosen._compile_all_devices = True  # type: ignore[assignment]
    model.generation_config.compile_config = chosen


def stop_compiling(model: Any) -> None:
    """Undo compile_decoding."""
    model.generation_config.compile_config = None


def measured(label: str, model: nn.Module, told: Answer) -> Column:
    """A column of the table for `model` as it is now."""
    return Column(label=label, weights=weight_bytes(model), process=process_bytes(), answer=told)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    packed = {t.data_ptr(): t for m in model.modules() if isinstance(m, PackedLayer) for t in m.packed}
    return sum(t.numel() * t.element_size() for t in (tensors | packed).values())


def process_bytes() -> int | None:
    """Memory that this process has in use, as Linux counts it; None elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    import resource

    return pages * resource.getpagesize()


def give_back_freed() -> None:
    """Let the C library return freed memory to the system, so that process_bytes does not count it. glibc only."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def results_table(name: str, columns: Sequence[Column], arithmetic: str) -> str:
    """One line a fact, one column a model; the first is what the others' accuracy was measured against."""
    answers, accuracy = [column.answer for column in columns], [column.accuracy for column in columns]
    result = next(found for found in accuracy if found is not None)
    rows = [[name, *(c.label for c in columns)],
            ["weights in memory", *(f"{c.weights / 2**20:.1f} MiB" for c in columns)],
            ["whole process", *("" if c.answer is None else "unknown" if c.process is None else
                                f"{c.process / 2**20:.0f} MiB" for c in columns)],
            ["time to first token", *("" if told is None else f"{told.first_token_s:.2f} s" for told in answers)],
            ["tokens a second", *("" if told is None or told.tokens_per_s is None else f"{told.tokens_per_s:.1f}"
                                  for told in answers)],
            ["perplexity", f"{result.reference_perplexity:.2f}",
             *("" if found is None else f"{found.perplexity:.2f}" for found in accuracy[1:])],
            ["KL from bf16, nats a token",
             *("" if found is None else f"{found.kl:.3f} ± {found.kl_stderr or 0:.3f}" for found in accuracy)],
            ["same top-1 token", *("" if found is None else f"{found.top1_agreement:.1%}" for found in accuracy)]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    threads = torch.get_num_threads()
    lines.append(f"{threads} threads; {result.tokens:,} tokens of text, {arithmetic} arithmetic for the bf16 model's "
                 "perplexity; the compiled process also holds the compiler")
    return "\n".join(line.rstrip() for line in lines)


def _stop_after(length: int) -> Any:
    from transformers import StoppingCriteria

    class Length(StoppingCriteria):
        """Stops at `length` without telling generate(), which would make a smaller cache."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= length, device=input_ids.device)

    return Length()
