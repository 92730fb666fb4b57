"""Tuning: a problem in, the config to run it with out: a kept choice, the table's, or the best of a few measured.

Nothing is measured unless QPASS_CUDA_TUNE is a number: at most so many configs are then tried for each problem, once,
and the choice is kept on disk by GPU, Triton and program versions. While a CUDA graph is being captured, or a graph is
being traced, nothing is ever measured. Writing is to a temporary file which is then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.kernels.cpu.build import cache_dir
from qpass.kernels.cuda.configs import Config, Problem, bucket, default_config, fitted

MOST_TRIED = 24
_REPEATS = 5
_kept: dict[str, dict[Problem, Config]] = {}


def chosen_config(problem: Problem, run: Callable[[Config], Any], x: Tensor) -> Config:
    """The config for a problem; `run` computes it with a config. x says where, and whether this is only a trace."""
    key = replace(problem, m=bucket(problem.m))
    kept = _choices(x.device) if x.device.type == "cuda" and torch.cuda.is_available() else {}
    if key in kept:
        return fitted_splits(problem, kept[key])
    table = default_config(problem)
    most = min(int(os.environ.get("QPASS_CUDA_TUNE") or 0), MOST_TRIED)
    if most < 2 or not _may_measure(x):
        return table
    best = measured_best(neighbours(problem, table)[:most], run)
    kept[key] = best
    keep(cache_dir() / file_name(x.device), kept)
    return best


def fitted_splits(problem: Problem, config: Config) -> Config:
    """A kept choice; it was made for the bucket, and holds for every number of rows in it."""
    return config if problem.m <= 64 else replace(config, splits=1)


def neighbours(problem: Problem, start: Config) -> list[Config]:
    """Configs worth trying, the table's first, each once."""
    found = [start]
    for block_n in (start.block_n, start.block_n // 2, start.block_n * 2):
        for block_k in (start.block_k, start.block_k * 2, start.block_k // 2):
            for warps, stages in ((start.warps, start.stages), (start.warps, start.stages + 1), (8, start.stages),
                                  (start.warps // 2, start.stages)):
                if block_n < 16 or block_n > 256 or warps < 1:
                    continue
                one = fitted(problem, replace(start, block_n=block_n, block_k=block_k, warps=warps, stages=stages))
                if one not in found:
                    found.append(one)
    for splits in (1, 2, 4, 8):
        if problem.m <= 64 and not problem.grouped and replace(start, splits=splits) not in found:
            found.insert(1, replace(start, splits=splits))
    return found


def measured_best(configs: list[Config], run: Callable[[Config], Any]) -> Config:
    """The one with the least median time; one that does not compile or fit the GPU is passed over."""
    times: list[tuple[float, int]] = []
    for i, config in enumerate(configs):
        try:
            run(config)
            times.append((statistics.median(_milliseconds(run, config) for _ in range(_REPEATS)), i))
        except Exception:  # out of shared memory or registers, say: the next may do
            continue
    return configs[min(times)[1]] if times else configs[0]


def _milliseconds(run: Callable[[Config], Any], config: Config) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(config)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _may_measure(x: Tensor) -> bool:
    if x.device.type != "cuda" or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _choices(device: torch.device) -> dict[Problem, Config]:
    name = file_name(device)
    if name not in _kept:
        _kept[name] = read(cache_dir() / name)
    return _kept[name]


def read(path: Path) -> dict[Problem, Config]:
    """The choices of a file; none if it is not there or holds something else."""
    try:
        return {Problem(**json.loads(key)): Config(**value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(path: Path, choices: dict[Problem, Config]) -> None:
    """Add `choices` to a file, whole or not at all; another process may have added its own meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    both = {json.dumps(asdict(problem)): asdict(config) for problem, config in (read(path) | choices).items()}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(both, file, indent=0)
    os.replace(file.name, path)


@cache
def _version() -> str:
    import triton

    here = Path(__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(here.rglob("*.py")))
    return hashlib.sha256(source + triton.__version__.encode()).hexdigest()[:12]


@cache
def file_name(device: torch.device) -> str:
    """Where the choices for this kind of GPU are kept: its name, and the version of Triton and of these programs."""
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return f"cuda-{gpu}-{_version()}.json"
