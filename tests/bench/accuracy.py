"""What each way to quantize costs in quality: a table of KL, same top-1 token, perplexity, bits and seconds.

    python tests/bench/accuracy.py --model DIR --texts DIR                 every row, both texts
    python tests/bench/accuracy.py --model DIR --texts DIR --only gptq     rows whose name contains "gptq"
    python tests/bench/accuracy.py ... --samples 32 --windows 4            quicker, for development

The model is a bf16 checkpoint of Transformers with its tokenizer; the texts are files `austen-*.txt` and `sotu*.txt`.
Calibration samples are spread over the calibration books, windows over the evaluation texts; all rows see the same.
Mathematics is in float32. KL is in nats a token against the bf16 model, in float64 sums; every row is the quantized
model itself, and beside it (`float`) the KL of its dequantized weights in ordinary layers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qpass

CALIBRATE_ON = ("austen-emma", "austen-mansfield-park", "austen-pride-and-prejudice")
EVALUATE_ON = {"austen": ("austen-sense-and-sensibility", "austen-persuasion"), "union": ("sotu",)}
ROWS_AT_ONCE = 256
SEARCH_SAMPLES, SEARCH_LENGTH = 64, 128


@dataclass(frozen=True)
class Row:
    """One way to quantize: a preset, the group size of its weights (None keeps the preset's), and algorithms.

    With `budget` the schemes are searched for, from 3 to 8 bits in groups of that size.
    """

    name: str
    preset: str
    group_size: int | None
    algorithms: tuple[Any, ...] = ()
    budget: str | None = None

    def recipe(self, model: Any, samples: Tensor) -> qpass.Recipe:
        """The recipe; a search looks at the model and at the samples."""
        if self.budget is not None:
            schemes = [qpass.PRESETS[f"w{bits}a16"].with_group_size(self.group_size) for bits in (3, 4, 5, 6, 8)]
            every = [row[None] for sample in samples for row in sample.split(SEARCH_LENGTH)]
            data = every[::max(1, len(every) // SEARCH_SAMPLES)]
            return qpass.search(model, self.budget, data=data, schemes=schemes, num_samples=SEARCH_SAMPLES,
                                max_seq_length=SEARCH_LENGTH, algorithms=self.algorithms)
        scheme = qpass.PRESETS[self.preset]
        return qpass.Recipe(scheme if self.group_size is None else scheme.with_group_size(self.group_size),
                            algorithms=self.algorithms)


ROWS = (
    Row("w4a16 g64, round to nearest", "w4a16", 64),
    Row("w4a16 g64, signed scales", "w4a16", 64, ({"scales": {"method": "signed"}},)),
    Row("w4a16 g64, searched scales", "w4a16", 64, ({"scales": {"method": "search"}},)),
    Row("w4a16 g64, hqq", "w4a16", 64, ({"scales": {"method": "hqq"}},)),
    Row("w4a16_asym g64, round to nearest", "w4a16_asym", 64),
    Row("w4a16_asym g64, searched scales", "w4a16_asym", 64, ({"scales": {"method": "search"}},)),
    Row("w4a16_asym g64, hqq", "w4a16_asym", 64, ({"scales": {"method": "hqq"}},)),
    Row("w4a16 g64, awq", "w4a16", 64, ({"awq": {"clip": True}},)),
    Row("w4a16 g64, gptq as published", "w4a16", 64, ({"gptq": {"match_float": False}},)),
    Row("w4a16 g64, gptq", "w4a16", 64, ("gptq",)),
    Row("w4a16 g64, gptq, signed scales", "w4a16", 64, ({"gptq": {"scales": "signed"}},)),
    Row("w4a16 g64, autoround", "w4a16", 64, ("autoround",)),
    Row("w4a16 g64, gptq, autoround", "w4a16", 64, ({"gptq": {"scales": "signed"}}, {"autoround": {"iterations": 50}})),
    Row("w4a16_asym g64, gptq", "w4a16_asym", 64, ({"gptq": {"scales": "search"}},)),
    Row("search at 4.5 bits, gptq", "search", 64, ({"gptq": {"scales": "signed"}},), budget="4.5 bits"),
    Row("w4a8 g64, round to nearest", "w4a8", 64),
    Row("w4a8 g64, gptq", "w4a8", 64, ({"gptq": {"scales": "signed"}},)),
    Row("w8a8, round to nearest", "w8a8", None),
    Row("w8a8, smoothquant", "w8a8", None, ("smoothquant",)),
    Row("w8a8, smoothquant, gptq", "w8a8", None, ("smoothquant", "gptq")),
    Row("w8a16, round to nearest", "w8a16", 32),
)


@dataclass(frozen=True)
class Score:
    """Means over the tokens of one text."""

    kl: float
    top1: float
    perplexity: float


class Judge:
    """The reference's final hidden states on every window, computed once and kept in a file."""

    def __init__(self, folder: Path, windows: dict[str, Tensor], cache: Path) -> None:
        self.windows = windows
        self.model = load(folder)
        self.hidden: dict[str, Tensor] = {}
        for name, ids in windows.items():
            path = cache / f"{folder.name}-{name}-{ids.shape[0]}x{ids.shape[1]}.pt"
            if path.exists():
                self.hidden[name] = torch.load(path, weights_only=True)
            else:
                self.hidden[name] = torch.stack([hidden_of(self.model, row) for row in ids])
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(self.hidden[name], path)
        self.head = self.model.get_output_embeddings()

    @torch.inference_mode()
    def score(self, model: Any, name: str) -> Score:
        """KL(reference || model), agreement, and the model's own perplexity on one text."""
        kl = agreed = loss = 0.0
        count = 0
        for ids, wanted in zip(self.windows[name], self.hidden[name], strict=True):
            hidden = hidden_of(model, ids)
            head = model.get_output_embeddings()
            for start in range(0, len(ids), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                ours, theirs = head(hidden[rows]).log_softmax(-1), self.head(wanted[rows]).log_softmax(-1)
                kl += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
                agreed += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
                targets = ids[start + 1:start + 1 + ROWS_AT_ONCE]
                loss -= float(ours[:len(targets)].gather(-1, targets[:, None]).double().sum())
                count += len(targets)
        tokens = self.windows[name].numel()
        return Score(kl / tokens, agreed / tokens, math.exp(loss / count))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def hidden_of(model: Any, ids: Tensor) -> Tensor:
    """[T] ids -> final hidden states [T, hidden], what the head multiplies."""
    return model.base_model(input_ids=ids[None], use_cache=False)[0][0].float()  # type: ignore[no-any-return]


def spread(texts: Path, names: Sequence[str], tokenizer: Any, count: int, length: int) -> Tensor:
    """[count, length] ids: windows spread evenly over each text, the texts sharing the count."""
    rows = []
    for number, name in enumerate(names):
        path = next(iter(sorted(texts.glob(f"{name}*.txt"))))
        ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
        share = count // len(names) + (number < count % len(names))
        have = len(ids) // length
        rows += [ids[have * i // share * length:][:length] for i in range(share)]
    return torch.stack(rows)


def measure(row: Row, args: argparse.Namespace, judge: Judge, samples: Tensor) -> Iterator[dict[str, Any]]:
    """One record a text for one way to quantize."""
    model = load(args.model, torch.bfloat16)
    start, cpu = time.perf_counter(), time.process_time()
    recipe = row.recipe(model, samples)
    needs = any(algorithm.needs_data for algorithm in recipe.algorithms)
    data: Any = [sample[None] for sample in samples] if needs else None
    qpass.quantize(model, recipe, calibration=data, num_samples=len(samples), max_seq_length=samples.shape[1],
                   progress=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rows = [r for r in qpass.explain(model).rows if r.status == "quantized"]
    weights = sum(math.prod(r.shape) for r in rows)
    bits = qpass.explain(model).rows and model.__dict__["_qpass_plan"].totals.bits_per_weight
    model.float()
    texts = [name for name in judge.windows if args.text in (None, name)]
    own = {name: judge.score(model, name) for name in texts} if not args.float_only else {}
    qpass.dequantize(model).float()
    for name in texts:
        floated = judge.score(model, name)
        yield {"row": row.name, "text": name, "bits": bits, "weights": weights, "seconds": seconds,
               "cpu_seconds": cpu,
               "samples": len(samples) if needs else 0, **asdict(own.get(name, floated)), "float_kl": floated.kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens, a text")
    parser.add_argument("--text", choices=sorted(EVALUATE_ON), help="one text only")
    parser.add_argument("--float-only", action="store_true", help="leave out the run of the quantized model itself")
    parser.add_argument("--cache", type=Path, default=Path(".cache/accuracy"))
    parser.add_argument("--json", type=Path, help="append one record a line")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = {name: spread(args.texts, books, tokenizer, args.windows, 1024) for name, books in EVALUATE_ON.items()
               if args.text in (None, name)}
    samples = spread(args.texts, CALIBRATE_ON, tokenizer, args.samples, args.length)
    judge = Judge(args.model, windows, args.cache)
    print(f"{'':<40} {'text':<7} {'bits':>5} {'KL':>8} {'float':>8} {'top-1':>6} {'ppl':>7} {'s':>6} {'cpu s':>6}")
    for row in ROWS:
        if any(part in row.name for part in args.only):
            for found in measure(row, args, judge, samples):
                print(f"{row.name:<40} {found['text']:<7} {found['bits']:>5.2f} {found['kl']:>8.4f} "
                      f"{found['float_kl']:>8.4f} {found['top1']:>6.1%} {found['perplexity']:>7.2f} "
                      f"{found['seconds']:>6.1f} {found['cpu_seconds']:>6.1f}", flush=True)
                if args.json:
                    with args.json.open("a") as lines:
                        lines.write(json.dumps({**found, "threads": torch.get_num_threads()}) + "\n")


if __name__ == "__main__":
    main()
