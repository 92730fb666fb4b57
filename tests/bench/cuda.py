"""CUDA benchmark: builds, checks and times the kernels on a GPU, prints the table of goals and writes JSON.

    python tests/bench/cuda.py --out cuda.json             with a GPU, PyTorch and Triton; nothing is installed
    python tests/bench/cuda.py --dry-run --out dry.json    the same on a CPU, tiny, in Triton's interpreter

A stage that fails is reported by its name and the next goes on; what has been found is written after each stage. Stages
that would begin after --seconds are skipped, and say so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_checkout import use_checkout


def machine_facts(dry: bool) -> dict[str, Any]:
    import torch
    import triton

    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "dry_run": dry,
                             "python": platform.python_version(), "torch": torch.__version__,
                             "triton": triton.__version__}
    if not dry:
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "capability": f"sm_{gpu.major}{gpu.minor}", "memory_gib": gpu.total_memory >> 30,
                  "multiprocessors": gpu.multi_processor_count, "l2_mib": gpu.L2_cache_size >> 20}
    return facts


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, interpreted; its times mean nothing")
    parser.add_argument("--out", type=Path, default=Path("cuda.json"), help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=560, help="no stage begins later than this")
    parser.add_argument("--only", nargs="*", help="names of the stages to run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    begin = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    use_checkout()
    if options.dry_run:
        from tests.kernels.cuda.interpreter import use_interpreter

        use_interpreter()
    found: dict[str, Any] = {"stages": {}, "goals": []}
    from cuda_goals import table
    from cuda_stages import stages
    from cuda_time import Machine

    machine = Machine(dry=options.dry_run)
    every: dict[str, Callable[[], Any]] = {"machine": lambda: machine_facts(options.dry_run), **stages(machine, found)}
    failed = []
    for name, run in every.items():
        if options.only and name not in (*options.only, "machine"):
            continue
        started = time.monotonic()
        if started - begin > options.seconds:
            failed.append(name)
            found["stages"][name] = {"skipped": f"{started - begin:.0f} s were gone"}
            print(f"== {name}: skipped, {started - begin:.0f} s were gone", flush=True)
            continue
        print(f"== {name}", flush=True)
        try:
            found["stages"][name] = {"result": run()}
        except Exception as error:
            failed.append(name)
            found["stages"][name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            print(f"   FAILED {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        found["stages"][name]["seconds"] = round(time.monotonic() - started, 1)
        print(f"   {time.monotonic() - started:.1f} s, {time.monotonic() - begin:.0f} s in all", flush=True)
        options.out.write_text(json.dumps(found, indent=1, default=str))
    print(table(found))
    if failed:
        print("failed or skipped: " + ", ".join(failed))
    options.out.write_text(json.dumps(found, indent=1, default=str))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
