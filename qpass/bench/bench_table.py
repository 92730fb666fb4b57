"""Bench report: a measured model in, one table out, the recipe that it speaks for and why; and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from qpass.bench.run import Measured, ModelBench
from qpass.reports.text_table import Column, human_bytes, text_table

COLUMNS: tuple[Column, ...] = (
    ("recipe", "<"), ("weights", ">"), ("memory", ">"), ("at most", ">"), ("load s", ">"), ("compile s", ">"),
    ("prompt tok/s", ">"), ("decode tok/s", ">"), ("perplexity", ">"), ("KL", ">"), ("same top-1", ">"), ("note", "<"))


def table(found: ModelBench, *, kl_limit: float) -> str:
    """One line a recipe, notes, and the recommendation."""
    base = found.rows[0]
    rows = [_row(row, base, found) for row in found.rows]
    lines = [text_table(COLUMNS, rows, width=180), "", _how(found)]
    reasons = dict.fromkeys(found.skipped.values())
    lines += [f"not tried: {', '.join(name for name, why in found.skipped.items() if why == reason)}: {reason}"
              for reason in reasons]
    return "\n".join([*lines, "", recommendation(found, kl_limit=kl_limit)])


def recommended(found: ModelBench, *, kl_limit: float) -> Measured:
    """The fastest at decoding of those whose KL from the float model is at most `kl_limit`; its own is 0."""
    near = [row for row in found.rows if row.speed is not None and _kl(row, found) <= kl_limit]
    return max(near, key=lambda row: row.speed.decode if row.speed else 0.0)


def recommendation(found: ModelBench, *, kl_limit: float) -> str:
    """Which recipe to use here and why, and what it would take to choose a faster one."""
    best, base = recommended(found, kl_limit=kl_limit), found.rows[0]
    assert best.speed and base.speed and best.load and base.load
    limit = f"{kl_limit:g} nats a token"
    if best is base:
        lines = [f"use the float model here: no recipe decodes faster with a KL of at most {limit}"]
    else:
        lines = [f"use {best.label} here: the fastest at decoding of those with a KL of at most {limit}",
                 f"  {best.speed.decode / base.speed.decode:.2f}x the float model's decoding, "
                 f"{best.speed.prefill / base.speed.prefill:.2f}x its prompt, "
                 f"{best.load.weights / base.load.weights:.0%} of its bytes, KL {_kl(best, found):.4f}"]
    for row in found.rows:
        if row.speed is not None and row.speed.decode > best.speed.decode and _kl(row, found) > kl_limit:
            lines.append(f"  {row.label} decodes {row.speed.decode / best.speed.decode:.2f}x as fast as that, but its "
                         f"KL is {_kl(row, found):.3f}; --kl-limit sets what is acceptable")
    return "\n".join(lines)


def as_json(found: ModelBench, *, kl_limit: float) -> str:
    """Everything that was measured, and the label that is recommended."""
    data: dict[str, Any] = asdict(found)
    return json.dumps({**data, "kl_limit": kl_limit, "recommended": recommended(found, kl_limit=kl_limit).label},
                      indent=2)


def _kl(row: Measured, found: ModelBench) -> float:
    if row is found.rows[0]:
        return 0.0
    return float("inf") if row.accuracy is None or row.accuracy.kl is None else row.accuracy.kl


def _row(row: Measured, base: Measured, found: ModelBench) -> list[str]:
    cells = [row.label]
    if row.load is None:
        cells += [""] * 4
    else:
        sizes = (row.load.weights, row.load.added, row.load.peak_added)
        cells += [*("" if size is None else human_bytes(size) for size in sizes), f"{row.load.seconds:.1f}"]
    if row.speed is None:
        cells += [""] * 3
    else:
        cells += ["" if row.speed.compile_s is None else f"{row.speed.compile_s:.0f}",
                  f"{row.speed.prefill:.0f}", f"{row.speed.decode:.1f}"]
    if row.accuracy is None:
        shared = next((other.accuracy for other in found.rows if other.accuracy is not None), None)
        known = row is base and shared is not None and shared.reference_perplexity is not None
        cells += [f"{shared.reference_perplexity:.2f}" if known and shared else "", "", ""]
    else:
        cells += [f"{row.accuracy.perplexity:.2f}", f"{row.accuracy.kl:.4f}", f"{row.accuracy.top1_agreement:.1%}"]
    short = row.speed is not None and base.speed is not None and row.speed.prompt != max(
        r.speed.prompt for r in found.rows if r.speed is not None)
    note = f"prompt of {row.speed.prompt} tokens, more would take too long" if short and row.speed else ""
    return [*cells, row.failed or note]


def _how(found: ModelBench) -> str:
    prompt = max(row.speed.prompt for row in found.rows if row.speed is not None)
    made = "decoding compiled" if found.compiled else "nothing compiled"
    return (f"{found.threads} threads, batch {found.batch}, prompt of {prompt} tokens, generate() with a static cache, "
            f"{made}; accuracy on {found.tokens:,} tokens of text beside the float model in {found.arithmetic}; "
            "memory: what the process grew by when the model was ready, and at most until then")
