"""What each generation of GPUs lacks is a sentence, and the support matrix says it of every CUDA kernel."""

from __future__ import annotations

import pytest
import torch

import qpass
from qpass.kernels import isa
from qpass.kernels.cuda.capability import assume, capability_of, machine_refuses
from qpass.kernels.cuda.linear import FLOAT_FAMILIES, FP8_FAMILIES, INT8_FAMILIES
from qpass.kernels.registry import KERNELS, LinearCall, choose, kernel, load_builtin
from tests.kernels.cuda.products import FP8, INT8, spec_for, weight_args

CUDA = torch.device("cuda")


def call_of(weight: str, activation: object = None, dtype: torch.dtype = torch.bfloat16, k: int = 256) -> LinearCall:
    spec = spec_for(weight_args(weight), activation, 64, k)  # type: ignore[arg-type]
    return LinearCall(spec=spec, device=CUDA, dtype=dtype)


@pytest.mark.parametrize(("capability", "name"), [(70, "Volta"), (75, "Turing")])
def test_older_gpus_are_refused_by_name(capability: int, name: str) -> None:
    load_builtin()
    with assume(capability):
        why = KERNELS["linear_w4a16_triton"].takes(call_of("int4:g128"))
    assert why == f"needs sm_80 for tensor cores that Triton uses, this GPU is sm_{capability} ({name})"


def test_float8_needs_ada() -> None:
    fp8 = kernel("linear_fp8_w8afp8_triton")
    with assume(80):
        assert fp8.takes(call_of("fp8:channel", FP8)) == "needs sm_89 for float8 products, this GPU is sm_80 (Ampere)"
        assert kernel("linear_fp8_w8a16_triton").takes(call_of("fp8:channel")) is None
    with assume(89):
        assert fp8.takes(call_of("fp8:channel", FP8)) is None


@pytest.mark.parametrize(("call", "why"), [
    (call_of("int4:g48", k=96), "needs group_size % 32 == 0, got 48"),
    (call_of("int4:g128", dtype=torch.float64), "takes float32, bfloat16 or float16 activations, not float64"),
], ids=["group", "dtype"])
def test_arguments_are_refused_in_a_sentence(call: LinearCall, why: str) -> None:
    assert kernel("linear_w4a16_triton").takes(call) == why


def test_the_machine_is_asked_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert capability_of(CUDA) is None
    assert isa.machine_refuses("sm_80") == machine_refuses("sm_80") == "needs sm_80, there is no CUDA device here"


def test_the_matrix_says_what_was_only_interpreted() -> None:
    rows = {row.kernel: row for row in qpass.support_matrix().rows}
    for family in (*FLOAT_FAMILIES, *INT8_FAMILIES, *FP8_FAMILIES):
        row = rows[f"linear_{family}_triton"]
        assert row.weights and row.activations and row.dtypes == ("fp32", "bf16", "fp16"), family
        assert row.gpus == (("sm_89", "sm_90") if family in FP8_FAMILIES else ("sm_80", "sm_89", "sm_90"))
        assert row.interpreted_only == (not row.proven)
    assert rows["linear_w8a8_int_mm"].gpus[0] == "sm_75" and not rows["linear_reference"].interpreted_only
    assert "interpreted only" in str(qpass.support_matrix())


def test_without_a_gpu_nothing_here_runs_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = choose(call_of("int4:g128", INT8))
    assert choice.kernel.name == "linear_reference"
    assert choice.refusals["linear_w4a8_triton"] == "needs sm_80, there is no CUDA device here"
