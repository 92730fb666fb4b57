"""support_matrix: one row a registered kernel, saying what the kernel itself says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qpass
from qpass.kernels import isa
from qpass.kernels.registry import KERNELS, LinearCall, kernel
from qpass.kernels.support import SupportRow


@pytest.fixture
def own_kernel() -> Iterator[str]:
    def refuses(call: LinearCall) -> str | None:
        if call.spec.group_size != 64:
            return "needs groups of 64"
        return None if call.dtype == torch.bfloat16 else "needs bf16"

    @qpass.register_kernel(scheme="w4a16", device="cuda", isa="amx_int8", refuses=refuses, priority=99, name="own")
    def own(x, packed, bias, spec):  # type: ignore[no-untyped-def]
        raise AssertionError("the matrix runs nothing")

    yield "own"
    del KERNELS["own"]


def row(name: str) -> SupportRow:
    return next(r for r in qpass.support_matrix().rows if r.kernel == name)


def test_one_row_a_kernel_best_first() -> None:
    kernel("linear_reference")
    rows = qpass.support_matrix().rows
    assert sorted(r.kernel for r in rows) == sorted(KERNELS)
    assert [r.priority for r in rows] == sorted((r.priority for r in rows), reverse=True)


def test_the_reference_computes_everything_everywhere() -> None:
    found = row("linear_reference")
    assert (found.scheme, found.device, found.isa, found.runs_here) == ("every scheme", "every device", None, True)
    assert found.weights == ("g32", "g64", "g128", "channel", "tensor", "asym")
    assert set(found.activations) == {"float", "int8", "int8 asym", "int8 static"}
    assert found.dtypes == ("fp32", "bf16", "fp16")


def test_a_registered_kernel_appears_with_what_it_says(own_kernel: str) -> None:
    found = row(own_kernel)
    assert qpass.support_matrix().rows[0] == found
    assert (found.scheme, found.device, found.isa) == ("w4a16", "cuda", "amx_int8")
    assert found.weights == ("g64", "asym") and found.dtypes == ("bf16",) and found.activations == ("float",)


def test_why_not_is_a_sentence(own_kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert row(own_kernel).why_not == "there is no cuda device here" and not row(own_kernel).runs_here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(isa, "machine_has", lambda: ("avx2", "x86_64"))
    assert row(own_kernel).why_not.startswith("needs amx_int8, this CPU has avx2")
    monkeypatch.setattr(isa, "machine_has", lambda: ("amx_int8", "avx512_vnni", "avx2", "x86_64"))
    assert row(own_kernel).runs_here and row(own_kernel).why_not == ""


def test_what_runs_here_comes_first_in_the_text() -> None:
    matrix = qpass.support_matrix()
    lines = str(matrix).splitlines()[2:]
    assert sorted(line.split()[0] for line in lines) == sorted(row.kernel for row in matrix.rows)
    running = [row.kernel for row in matrix.rows if row.runs_here]
    assert [line.split()[0] for line in lines[:len(running)]] == running


def test_text_is_aligned_and_fits() -> None:
    lines = str(qpass.support_matrix()).splitlines()
    assert lines[0].startswith("kernel") and set(lines[1]) == {"-", " "}
    starts = [i for i, c in enumerate(lines[1]) if c == "-" and (i == 0 or lines[1][i - 1] == " ")]
    for line in lines[2:]:
        assert all(i == 0 or i >= len(line) or line[i - 1] == " " for i in starts), line
    assert max(map(len, lines)) <= 210
