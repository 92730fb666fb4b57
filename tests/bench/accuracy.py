"""What each way to quantize costs in quality: a table of KL, same top-1 token, perplexity, bits and seconds.

    python tests/bench/accuracy.py --model DIR --texts DIR                 every row, both texts
    python tests/bench/accuracy.py --model DIR --texts DIR --only gptq     rows whose name contains "gptq"; a row's
                                                                           whole name stands for that row alone
    python tests/bench/accuracy.py ... --goals                             rows that a goal is of
    python tests/bench/accuracy.py ... --samples 32 --windows 4            quicker, for development
    python tests/bench/accuracy.py ... --peers DIR                         and other tools, each from DIR/<name>/venv

The model is a bf16 checkpoint of Transformers with its tokenizer; the texts are files `austen-*.txt` and `sotu*.txt`.
Calibration samples are spread over the calibration books, windows over the evaluation texts; all rows see the same.
Mathematics is in float32. KL is in nats a token against the bf16 model, in float64 sums; every row is the quantized
model itself, and beside it (`float`) the KL of its dequantized weights in ordinary layers. The goals follow, with what
was measured. With `--json` the records are kept there, and rows that are run again replace those of before; with
`--work` a calibration that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_peers import PEERS
from accuracy_rows import GOALS, ROWS, Row, goal_lines
from torch import Tensor

import qpass

CALIBRATE_ON = ("austen-emma", "austen-mansfield-park", "austen-pride-and-prejudice")
EVALUATE_ON = {"austen": ("austen-sense-and-sensibility", "austen-persuasion"), "union": ("sotu",)}
ROWS_AT_ONCE = 256


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
    model, samples = load(args.model, torch.bfloat16), row.picked(samples)
    start, cpu = time.perf_counter(), time.process_time()
    recipe = row.recipe(model, samples)
    needs = any(algorithm.needs_data for algorithm in recipe.algorithms)
    data: Any = [sample[None] for sample in samples] if needs else None
    work = None if args.work is None else args.work / row.name.replace(" ", "-").replace(",", "")
    qpass.quantize(model, recipe, calibration=data, num_samples=len(samples), max_seq_length=samples.shape[1],
                   progress=False, work_folder=work)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    yield from judged(row.name, model, args, judge, {"seconds": seconds, "cpu_seconds": cpu,
                                                     "samples": len(samples) if needs else 0})


def judged(name: str, model: Any, args: argparse.Namespace, judge: Judge, facts: dict[str, Any]
           ) -> Iterator[dict[str, Any]]:
    """One record a text for a quantized model, which is float afterwards."""
    bits = qpass.explain(model).rows and model.__dict__["_qpass_plan"].totals.bits_per_weight
    model.float()
    texts = list(judge.windows)
    own = {text: judge.score(model, text) for text in texts} if not args.float_only else {}
    qpass.dequantize(model).float()
    for text in texts:
        floated = judge.score(model, text)
        yield {"row": name, "text": text, "bits": bits, **facts, "windows": len(judge.windows[text]),
               "threads": torch.get_num_threads(), **asdict(own.get(text, floated)), "float_kl": floated.kl}


def chosen(name: str, asked: Sequence[str]) -> bool:
    """Whether a row is asked for: by its whole name, or by a part of it that is no row's whole name."""
    names = {row.name for row in (*ROWS, *PEERS)}
    return any(name == part if part in names else part in name for part in asked)


def kept(path: Path | None) -> list[dict[str, Any]]:
    """The records of runs before."""
    return json.loads(path.read_text()) if path is not None and path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="rows of this name, or whose name contains it")
    parser.add_argument("--goals", action="store_true", help="only rows that a goal is of")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens, a text")
    parser.add_argument("--text", choices=sorted(EVALUATE_ON), help="one text only")
    parser.add_argument("--float-only", action="store_true", help="leave out the run of the quantized model itself")
    parser.add_argument("--cache", type=Path, default=Path(".cache/accuracy"))
    parser.add_argument("--peers", type=Path, help="folder of other tools' environments")
    parser.add_argument("--work", type=Path, help="keeps what a calibration has done, so that it can go on")
    parser.add_argument("--json", type=Path, help="keep the records in this file")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = {name: spread(args.texts, books, tokenizer, args.windows, 1024) for name, books in EVALUATE_ON.items()
               if args.text in (None, name)}
    samples = spread(args.texts, CALIBRATE_ON, tokenizer, args.samples, args.length)
    judge = Judge(args.model, windows, args.cache)
    records = kept(args.json)
    print(f"{'':<42} {'text':<7} {'bits':>5} {'KL':>8} {'float':>8} {'top-1':>6} {'ppl':>7} {'s':>6} {'cpu s':>6}")

    def show(name: str, found: Iterator[dict[str, Any]]) -> None:
        new = []
        for record in found:
            new.append(record)
            print(f"{name:<42} {record['text']:<7} {record['bits']:>5.2f} {record['kl']:>8.4f} "
                  f"{record['float_kl']:>8.4f} {record['top1']:>6.1%} {record['perplexity']:>7.2f} "
                  f"{record['seconds']:>6.1f} {record['cpu_seconds']:>6.1f}", flush=True)
        texts = {record["text"] for record in new}
        records[:] = [r for r in records if r["row"] != name or r["text"] not in texts] + new
        if args.json:
            args.json.write_text(json.dumps(records, indent=1) + "\n")

    wanted = {goal.row for goal in GOALS} if args.goals else {row.name for row in (*ROWS, *PEERS)}
    for row in ROWS:
        if row.name in wanted and chosen(row.name, args.only):
            show(row.name, measure(row, args, judge, samples))
    for peer in PEERS:
        if peer.name in wanted and chosen(peer.name, args.only):
            why = peer.missing(args.peers)
            if why is not None:
                print(f"{peer.name:<42} {why}")
                continue
            with tempfile.TemporaryDirectory() as scratch:
                facts = peer.run(args.peers, args.model, samples, Path(scratch))
                show(peer.name, judged(peer.name, qpass.load(Path(scratch) / "quantized"), args, judge, facts))
    print("\nThe goals are of 128 samples of 512 tokens and 16 windows, times of 2 cores with AMX.")
    print("\n".join(goal_lines(records)))


if __name__ == "__main__":
    main()
