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
was measured. With `--json` the records are kept there, and a row that has one of the same model and size for every text
is printed from it (marked *) and not run: a run of hours can be stopped and go on. `--again` runs it again. With
`--work` a calibration that was stopped goes on in the middle, and what a peer wrote is kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accuracy_peers import PEERS, AccuracyPeer
from accuracy_records import Records, Size
from accuracy_rows import GOALS, ROWS, Row, goal_lines, picked
from torch import Tensor

import qpass
from qpass.errors import QPassError

CALIBRATE_ON = ("austen-emma", "austen-mansfield-park", "austen-pride-and-prejudice")
EVALUATE_ON = {"austen": ("austen-sense-and-sensibility", "austen-persuasion"), "union": ("sotu",)}
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Score:
    """Means over the tokens of one text."""

    kl: float
    top1: float
    perplexity: float


@dataclass(frozen=True)
class Judge:
    """The reference's final hidden states on every window, computed when first needed and kept in a file."""

    folder: Path
    windows: dict[str, Tensor]
    cache: Path

    @cached_property
    def model(self) -> Any:
        return load(self.folder)

    @cached_property
    def hidden(self) -> dict[str, Tensor]:
        """By text: [windows, T, hidden]."""
        found = {}
        for name, ids in self.windows.items():
            path = self.cache / f"{self.folder.name}-{name}-{ids.shape[0]}x{ids.shape[1]}.pt"
            if path.exists():
                found[name] = torch.load(path, weights_only=True)
            else:
                found[name] = torch.stack([hidden_of(self.model, row) for row in ids])
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found[name], path)
        return found

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
                ours = head(hidden[rows]).log_softmax(-1)
                theirs = self.model.get_output_embeddings()(wanted[rows]).log_softmax(-1)
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


def measure(row: Row, samples: Tensor, judge: Judge, work: Path | None, texts: Sequence[str]
            ) -> Iterator[dict[str, Any]]:
    """One record a text for one way to quantize."""
    model = load(judge.folder, torch.bfloat16)
    start, cpu = time.perf_counter(), time.process_time()
    recipe = row.recipe(model, samples)
    needs = any(algorithm.needs_data for algorithm in recipe.algorithms)
    data: Any = [sample[None] for sample in samples] if needs else None
    work = None if work is None else work / row.name.replace(" ", "-").replace(",", "")
    qpass.quantize(model, recipe, calibration=data, num_samples=len(samples), max_seq_length=samples.shape[1],
                   progress=False, work_folder=work)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    yield from judged(model, judge, texts, {"seconds": seconds, "cpu_seconds": cpu,
                                            "samples": len(samples) if needs else 0})


def measure_peer(peer: AccuracyPeer, samples: Tensor, judge: Judge, root: Path, work: Path | None,
                 texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record a text for another tool; none, and the reason on stderr, if it fails: that costs its row only."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if work is None else work / peer.run_name(judge.folder, samples)
        try:
            facts = peer.run(root, judge.folder, samples, folder)
            model = qpass.load(folder / "quantized", peer.recipe)
        except (RuntimeError, ValueError, OSError, QPassError) as problem:
            print(f"{peer.name} failed: {problem}", file=sys.stderr)
            return
        yield from judged(model, judge, texts, facts)


def judged(model: Any, judge: Judge, texts: Sequence[str], facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One record a text for a quantized model, which is float afterwards; with `float` among the facts it is before.

    Bits are those of the tool's own file where it says them, for a plan's scales are of the model's dtype.
    """
    facts = dict(facts)
    quantized = not facts.pop("float", False)
    bits = {} if "bits" in facts else {"bits": model.__dict__["_qpass_plan"].totals.bits_per_weight}
    model.float()
    own = {text: judge.score(model, text) for text in texts}
    if quantized:
        qpass.dequantize(model).float()
    for text in texts:
        found = judge.score(model, text) if quantized else own[text]
        yield {"text": text, **bits, **facts, "threads": torch.get_num_threads(), **asdict(own[text]),
               "float_kl": found.kl}


def chosen(name: str, asked: Sequence[str]) -> bool:
    """Whether a row is asked for: by its whole name, or by a part of it that is no row's whole name."""
    names = {row.name for row in (*ROWS, *PEERS)}
    return any(name == part if part in names else part in name for part in asked)


def line_of(record: dict[str, Any], *, mark: str) -> str:
    """A record as a line of the table."""
    return (f"{record['row']:<50} {record['text']:<7} {record['bits']:>5.2f} {record['kl']:>8.4f} "
            f"{record['float_kl']:>8.4f} {record['top1']:>6.1%} {record['perplexity']:>7.2f} "
            f"{record['seconds']:>7.1f} {record['cpu_seconds']:>7.1f} {record['threads']:>7}{mark}")


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
    parser.add_argument("--cache", type=Path, default=Path(".cache/accuracy"))
    parser.add_argument("--peers", type=Path, help="folder of other tools' environments")
    parser.add_argument("--work", type=Path, help="keeps what a calibration has done, so that it can go on")
    parser.add_argument("--json", type=Path, help="keep the records in this file, and take from it what was run before")
    parser.add_argument("--again", action="store_true", help="run rows whose records are kept, too")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = {name: spread(args.texts, books, tokenizer, args.windows, 1024) for name, books in EVALUATE_ON.items()
               if args.text in (None, name)}
    samples = spread(args.texts, CALIBRATE_ON, tokenizer, args.samples, args.length)
    judge, records = Judge(args.model, windows, args.cache), Records(args.json)
    shown: list[dict[str, Any]] = []
    print(f"{'':<50} {'text':<7} {'bits':>5} {'KL':>8} {'float':>8} {'top-1':>6} {'ppl':>7} {'s':>7} {'cpu s':>7} "
          f"{'threads':>7}")

    def show(name: str, count: int, run: Callable[[Sequence[str]], Iterator[dict[str, Any]]]) -> None:
        size = Size(model=args.model.name, length=args.length, windows=args.windows)
        before = {} if args.again else records.found(name, size, count)
        for record in before.values():
            print(line_of(record, mark="*"), flush=True)
        missing = [text for text in windows if text not in before]
        for record in run(missing) if missing else ():
            new = records.add(name, size, record)
            shown.append(new)
            print(line_of(new, mark=""), flush=True)
        shown.extend(before.values())

    wanted = {goal.row for goal in GOALS} if args.goals else {row.name for row in (*ROWS, *PEERS)}
    for row in ROWS:
        if row.name in wanted and chosen(row.name, args.only):
            given = picked(samples, row.samples)
            show(row.name, len(given), partial(measure, row, given, judge, args.work))
    for peer in PEERS:
        if peer.name in wanted and chosen(peer.name, args.only):
            why, given = peer.missing(args.peers), picked(samples, peer.samples)

            def run(texts: Sequence[str], peer: AccuracyPeer = peer, why: str | None = why, given: Tensor = given
                    ) -> Iterator[dict[str, Any]]:
                if why is not None:
                    print(f"{peer.name:<50} {why}")
                    return iter(())
                return measure_peer(peer, given, judge, args.peers, args.work, texts)

            show(peer.name, len(given), run)
    print("\n* of a run before. The goals are of 128 samples of 512 tokens and 16 windows, times of 2 cores with AMX.")
    print("\n".join(goal_lines(shown)))


if __name__ == "__main__":
    main()
