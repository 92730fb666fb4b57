"""Block sizes: those of the table fit every problem, a few others are measured where asked, and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qpass.kernels.cuda import tuning
from qpass.kernels.cuda.configs import Config, Problem, bucket, default_config, rows_of
from qpass.kernels.cuda.program_numbers import numbers_of
from tests.kernels.cuda.products import spec_for, weight_args

PROBLEM = Problem(kind="half", m=1, n=4096, k=4096, step=128, halves=True, capability=90)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 100, 4096, 100000])
def test_the_table_fits_every_group(capability: int, m: int) -> None:
    for text in ("int4:g32", "int4:g96", "int4:g128", "int4:channel", "int8:g32", "int8:g96", "mxfp4:g32", "nvfp4:g16"):
        spec = spec_for(weight_args(text), None, 4096, 3072)
        numbers = numbers_of(spec)
        for kind in ("half", "int8", "fp8", "float"):
            found = default_config(Problem(kind=kind, m=m, n=4096, k=3072, step=numbers.step, halves=numbers.halves,
                                           capability=capability))
            for size in (found.block_m, found.block_n, found.block_k, found.warps, found.splits):
                assert size & (size - 1) == 0 and size > 0
            assert found.block_k >= (64 if numbers.halves else 32)
            assert not numbers.group or numbers.halves or numbers.group % found.block_k == 0
            assert not numbers.group or not numbers.halves or found.block_k == 64 or numbers.group % found.block_k == 0


def test_few_rows_split_k_until_the_gpu_is_full() -> None:
    narrow = Problem(kind="half", m=1, n=1024, k=8192, step=128, halves=True, capability=90)
    assert default_config(narrow).splits == 8
    assert default_config(Problem(**{**narrow.__dict__, "n": 28672})).splits == 1
    assert default_config(Problem(**{**narrow.__dict__, "m": 4096})).splits == 1


def test_buckets_and_symbolic_rows() -> None:
    assert [bucket(m) for m in (1, 16, 17, 64, 65, 5000)] == [16, 16, 32, 64, 128, 4096]

    class Node:
        hint = 48

    class Size:
        node = Node()

    assert rows_of(7) == 7 and rows_of(Size()) == 48 and rows_of(object()) == 16


def test_neighbours_are_few_different_and_begin_with_the_table() -> None:
    start = default_config(PROBLEM)
    found = tuning.neighbours(PROBLEM, start)
    assert found[0] == start and len(set(found)) == len(found) > 4
    assert all(one.block_k in (64, 128) for one in found)


def test_the_best_is_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [Config(block_m=16, block_n=n, block_k=64) for n in (16, 32, 64)]

    def run(config: Config) -> None:
        if config.block_n == 16:
            raise RuntimeError("out of shared memory")

    monkeypatch.setattr(tuning, "_milliseconds", lambda run, config: 1.0 / config.block_n)
    assert tuning.measured_best(configs, run) == configs[2]
    assert tuning.measured_best(configs[:1], run) == configs[0]


def test_choices_are_kept_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "made" / "choices.json"
    assert tuning.read(path) == {}
    one, other = default_config(PROBLEM), Config(block_m=16, block_n=32, block_k=64)
    tuning.keep(path, {PROBLEM: one})
    second = Problem(**{**PROBLEM.__dict__, "m": 64})
    tuning.keep(path, {second: other})
    assert tuning.read(path) == {PROBLEM: one, second: other}
    assert [p.name for p in path.parent.iterdir()] == ["choices.json"]
    path.write_text('{"nonsense": 3}')
    assert tuning.read(path) == {}


def test_nothing_is_measured_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(tuning, "measured_best", never)
    x = torch.empty(1, 4096)
    assert tuning.chosen_config(PROBLEM, never, x) == default_config(PROBLEM)
    monkeypatch.setenv("QPASS_CUDA_TUNE", "8")  # still not: this is no GPU
    assert tuning.chosen_config(PROBLEM, never, x) == default_config(PROBLEM)
