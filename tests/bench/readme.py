"""README: the numbers in results/ in, the measured section of README.md out; run as a script, this writes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import TABLES, Table

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SHOWN = ("W4A8", "W8A8", "W4A16")


def section(results: Path = HERE / "results") -> str:
    """The Markdown between the marks: of each kind of machine the last run."""
    told = {folder.name: _machine(folder) for folder in sorted(results.iterdir()) if folder.is_dir()}
    kinds = [f"### On a machine with {kind}\n\n{text}" for kind, text in told.items() if text]
    return "\n\n".join(kinds) or "No run is kept here; `make bench` makes one."


def _machine(results: Path) -> str:
    """The files of one folder; each part only if its file is there."""
    kernels, model = (_read(results / f"{name}.json") for name in ("kernels", "model"))
    mixtures = [_read(path) for path in sorted(results.glob("moe-*.json"))]
    parts = []
    for what, found in (("Products", kernels), ("Whole models", model),
                        *(("Mixture " + " and ".join(one["outcomes"]), one) for one in mixtures)):
        if found:
            parts.append(f"{what}: {found['machine']}; {found['date']} UTC; {_versions(found['versions'])}.")
    if kernels:
        shapes = len({(tuple(cell["n"]), cell["k"]) for cell in kernels["cells"] if cell["table"] == "W4A8"})
        parts.append("What qpass does on a product, weights read from memory at up to 16 tokens, and how many times "
                     f"the speed of each peer that is, lowest to highest over {shapes} shapes; the number of tokens is "
                     "below the product's name.")
        parts += [_table(table, [cell for cell in kernels["cells"] if cell["table"] == table.name])
                  for table in TABLES if table.name in SHOWN]
    if model:
        parts += ["Models of Llama-3.2-1B's shapes with random weights, tokens a second:", _models(model)]
    if mixtures:
        parts += ["Random weights, hidden 2048, vocabulary 32,000, 4 layers; experts x width and how many a token "
                  "chooses; tokens a second:", _mixtures(mixtures)]
    if (kept := results / "accuracy.json").exists():
        parts += ["Quality, by `make bench-accuracy`: SmolLM2-135M with permuted channels, all Linears but the head; "
                  "KL from the bf16 model in nats a token on two texts that nothing was calibrated on, and seconds to "
                  "quantize (many of them beside other work):", _accuracy(json.loads(kept.read_text(encoding="utf-8")))]
    goals = [goal for kept in (kernels, model, *mixtures) for goal in kept.get("goals", ())]
    reached = [goal for goal in goals if _reached(goal) is not None]
    if reached:
        count = sum(bool(_reached(goal)) for goal in reached)
        parts.append(f"{count} of the {len(reached)} goals that this machine can measure are reached; "
                     "[tests/bench/NOTES.md](tests/bench/NOTES.md) says the limits of the others.")
    return "\n\n".join(parts)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _reached(goal: Mapping[str, Any]) -> bool | None:
    if "reached" in goal:
        return None if goal["reached"] is None else bool(goal["reached"])
    return None if goal["lowest"] is None else goal["reached_in"] == goal["cells"]


def _table(table: Table, cells: Sequence[Mapping[str, Any]]) -> str:
    subject = table.columns[0].label
    shown = [column.label for column in table.columns[1:]
             if any(cell["timings"][column.label]["median_us"] for cell in cells)]
    if not cells:
        return f"{table.name} was not measured."
    rows = [[table.name, "qpass", *shown]]
    for m in sorted({cell["m"] for cell in cells}):
        mine = [cell for cell in cells if cell["m"] == m and cell["timings"][subject]["median_us"]]
        if not mine:
            continue
        rates = [_rate(cell, subject) for cell in mine]
        unit = "GB/s" if m <= 16 else "TOPS"
        digits = 1 if m <= 16 else 2
        row = [str(m), f"{_range(rates, digits)} {unit}"]
        for label in shown:
            times = [cell["timings"][label]["median_us"] / cell["timings"][subject]["median_us"] for cell in mine
                     if cell["timings"][label]["median_us"]]
            row.append(f"{_range(times, 2)}x" if times else "")
        rows.append(row)
    return _markdown(rows)


def _rate(cell: Mapping[str, Any], label: str) -> float:
    timing = cell["timings"][label]
    amount = timing["nbytes"] / 1e3 if cell["m"] <= 16 else 2 * cell["m"] * sum(cell["n"]) * cell["k"] / 1e6
    return float(amount / timing["median_us"])


def _models(model: Mapping[str, Any]) -> str:
    metrics = [metric for metric in next(iter(model["outcomes"].values()))["timings"]]
    rows = [["", *(f"{metric} 512" if metric == "prefill" else metric for metric in metrics), "peak after load"]]
    for label, outcome in model["outcomes"].items():
        cells = []
        for metric in metrics:
            timing = outcome["timings"].get(metric) or {}
            us = timing.get("median_us")
            cells.append(f"{outcome['tokens'][metric] / us * 1e6:.1f}" if us else "")
        if any(cells):  # one that could not be run has none
            rows.append([label, *cells, f"{outcome['peak'] / 1e6:.0f} MB" if outcome["peak"] else ""])
    return _markdown(rows)


def _mixtures(mixtures: Sequence[Mapping[str, Any]]) -> str:
    metrics = list(next(iter(next(iter(mixtures[0]["outcomes"].values())).values()))["timings"])
    rows = [["", "", *metrics, "peak memory"]]
    for shape, outcomes in [pair for one in mixtures for pair in one["outcomes"].items()]:
        for label, outcome in outcomes.items():
            spans = [(outcome["timings"].get(metric) or {}).get("median_us") for metric in metrics]
            cells = [f"{outcome['tokens'][metric] / us * 1e6:.1f}" if us else ""
                     for metric, us in zip(metrics, spans, strict=True)]
            rows.append([shape, label, *cells, f"{outcome['peak'] / 1e6:.0f} MB" if outcome["peak"] else ""])
    return _markdown(rows)


def _accuracy(records: Sequence[Mapping[str, Any]]) -> str:
    """Every row that has all texts, the smallest KL on the first text first."""
    texts = list(dict.fromkeys(record["text"] for record in sorted(records, key=lambda one: str(one["text"]))))
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["row"], {})[record["text"]] = record
    whole = {name: of for name, of in found.items() if len(of) == len(texts)}
    rows = [["", "bits a weight", *(f"KL, {text}" for text in texts), "same top-1 token", "seconds"]]
    for name, of in sorted(whole.items(), key=lambda pair: float(pair[1][texts[0]]["kl"])):
        first = of[texts[0]]
        rows.append([name, f"{first['bits']:.2f}", *(f"{of[text]['kl']:.4f}" for text in texts),
                     f"{first['top1']:.1%}", f"{first['seconds']:.0f}"])
    return _markdown(rows)


def _versions(*known: Mapping[str, Mapping[str, str]]) -> str:
    return ", ".join(dict.fromkeys(f"{name} {value}" for versions in known for one in versions.values()
                                   for name, value in one.items() if name not in ("kernels", "weights in")))


def _range(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def written(text: str, measured: str) -> str:
    """README.md with another measured section. Raises ValueError if it has no marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have {BEGIN} and {END} once")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{measured}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    README.write_text(written(README.read_text(encoding="utf-8"), section()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
