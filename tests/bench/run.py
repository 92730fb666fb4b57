"""Run: the benchmarks that `make bench` shows, their tables printed and their numbers kept as JSON.

usage: python tests/bench/run.py [--peers DIR] [--full] [--only kernels capture] [--json DIR] ...
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import model
import model_tables
import moe
import online
import products
from cells import TABLES
from goals import outcomes
from machine import machine_kind, machine_line
from peers import find_peers
from tables import goals_text, table_text

HERE = Path(__file__).parent
PARTS = ("kernels", "model", "moe", "online", "capture")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    began, failed = time.perf_counter(), 0
    for part in options.only:
        failed += {"kernels": _kernels, "model": _model, "moe": _moe, "online": _online,
                   "capture": _capture}[part](options)
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return failed


def _kernels(options: argparse.Namespace) -> int:
    found = find_peers(options.peers)
    wanted = products.Options(full=options.full, seconds=options.seconds, tables=options.tables, shapes=options.shapes,
                             tokens=options.tokens, rotate=options.rotate << 20)
    path = options.json / "kernels.json" if options.json else None

    def keep(cells: Sequence[products.Cell], versions: products.Versions) -> None:
        if path is not None:
            write_json(path, {
                **_when(options), "versions": versions, "missing": found.missing,
                "goals": [asdict(outcome) for table in TABLES for outcome in outcomes(table, cells)],
                "cells": [asdict(cell) for cell in cells]})

    cells, versions = products.run(found, options.threads, wanted, keep)
    timed = [table for table in TABLES if any(cell.table == table.name for cell in cells)]
    print(f"== kernels\n{machine_line(options.threads)}\n{versions_line(versions)}")
    for peer, why in found.missing.items():
        print(f"{peer}: {why}")
    print("Medians of calls taken in turn, ± half the distance of the quartiles; Nx: qpass is N times as fast; "
          "!N: other processes used N cores.\n")
    for table in timed:
        print(table_text(table, cells) + "\n")
    print(goals_text(timed, cells))
    if path is not None:
        print(f"\nwritten to {path}")
    wrong = [f"{label} in {cell.table}, M={cell.m}, {cell.n}x{cell.k}: {timing.why_not}" for cell in cells
             for label, timing in cell.timings.items() if label.startswith(("qpass", "g", "channel")) and timing.why_not
             and timing.why_not.startswith(("wrong", "failed"))]
    print("\n".join(wrong), file=sys.stderr)
    return len(wrong)


def _model(options: argparse.Namespace) -> int:
    path = options.json / "model.json" if options.json else None

    def keep(made: model.Models) -> None:
        if path is not None:
            write_json(path, {**_when(options), **model_tables.as_data(made)})

    made = model.run(find_peers(options.peers), options.threads, options.cache, options.models, keep)
    print(f"\n== whole model, Llama-3.2-1B's shapes\n{machine_line(options.threads)}\n{versions_line(made.versions)}\n")
    print(model_tables.text(made))
    if path is not None:
        print(f"\nwritten to {path}")
    return sum(outcome.why_not is not None for label, outcome in made.outcomes.items() if label.startswith("qpass"))


def _moe(options: argparse.Namespace) -> int:
    failed = 0
    for name in [name for name in moe.SHAPES if not options.models or name in options.models]:
        path = options.json / f"moe-{name}.json" if options.json else None
        made = moe.run(find_peers(options.peers), options.threads, options.cache, (name,),
                       keep=lambda made, path=path: _keep_mixtures(options, path, made))
        print(f"\n== mixtures of experts\n{machine_line(options.threads)}\n{versions_line(made.versions)}\n")
        print(moe.text(made), flush=True)
        if path is not None:
            print(f"\nwritten to {path}")
        failed += made.outcomes[name][moe.OURS].why_not is not None
    return failed


def _keep_mixtures(options: argparse.Namespace, path: Path | None, made: moe.Mixtures) -> None:
    if path is not None:
        write_json(path, {**_when(options), **moe.as_data(made)})


def _online(options: argparse.Namespace) -> int:
    made = online.run(options.threads)
    print(f"\n== new weights and caches\n{machine_line(options.threads)}\n\n{online.text(made)}", flush=True)
    if options.json:
        write_json(options.json / "online.json", {**_when(options), **online.as_data(made)})
    return len(made.why_not)


def _capture(options: argparse.Namespace) -> int:
    print("\n== capture", flush=True)
    return int(subprocess.run([sys.executable, str(HERE / "capture.py")], check=False).returncode != 0)


def _when(options: argparse.Namespace) -> dict[str, str]:
    return {"machine": machine_line(options.threads), "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}


def versions_line(versions: dict[str, dict[str, str]]) -> str:
    """`PyTorch 2.13.0, llama.cpp 0.25.3, ...`, each once."""
    return ", ".join(dict.fromkeys(f"{name} {value}" for known in versions.values() for name, value in known.items()))


def write_json(path: Path, data: object) -> None:
    """Keep the numbers; a run that is stopped meanwhile leaves those that were kept before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=os.environ.get("QPASS_BENCH_PEERS") or None, metavar="DIR",
                        help="folder of the peers' installations; without it only PyTorch is compared with")
    parser.add_argument("--full", action="store_true", help="every shape and batch in every table (an hour)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a turn")
    parser.add_argument("--tables", nargs="+", default=(), choices=[table.name for table in TABLES])
    parser.add_argument("--shapes", type=int, metavar="N",
                        help="only the first N shapes of each table")
    parser.add_argument("--tokens", nargs="+", type=int, default=())
    parser.add_argument("--models", nargs="+", default=(), metavar="LABEL",
                        help="only the speed of these models, or these mixtures")
    parser.add_argument("--rotate", type=int, default=600, metavar="MB", help="weights in rotation at few tokens")
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".cache" / "bench", metavar="DIR",
                        help="where the whole models are kept, 10 GB of them (default: .cache/bench)")
    parser.add_argument("--json", type=Path, default=HERE / "results" / machine_kind(),
                        help="folder for the numbers (default: that of machines like this one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
