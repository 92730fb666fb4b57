"""The Triton programs compile for sm_80, sm_89 and sm_90, to the tensor-core instructions and loads meant."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import pytest
import torch

from qpass.activation_args import ActivationArgs
from qpass.kernels.cuda.attention import attend_quantized
from qpass.kernels.cuda.launch import Grouping, Rows, multiply, operands
from qpass.kernels.cuda.layouts import names
from qpass.kernels.cuda.linear import forward
from tests.kernels.cuda.compiled import Compiled, compile_launch, fake, like, recorded
from tests.kernels.cuda.products import FP8, FP8_GROUPS, INT8, INT8_ASYM, make_product, spec_for, weight_args

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")),
                                reason="needs Triton, not interpreting")
BF16, FP16 = torch.bfloat16, torch.float16
N, K = 256, 512


@cache
def compiled(weight: str, activation: ActivationArgs | None, m: int, target: int, dtype: torch.dtype = BF16,
             count: int = 1) -> Compiled:
    made = make_product(spec_for(weight_args(weight), activation, N, K), dtype)

    def run() -> None:
        forward(fake(m, K, dtype=dtype), like(made.packed) * count, [None] * count, [made.spec] * count)

    launch, = recorded(run, target)
    return compile_launch(launch, target)


def products_of(kind: str, target: int) -> set[str]:
    """The instruction that must multiply: warp groups' from sm_90, a warp's before."""
    types = {"bf16": "f32.bf16.bf16", "fp16": "f32.f16.f16", "int8": "s32.s8.s8", "fp8": "f32.e4m3.e4m3"}[kind]
    last = types.split(".")[0]
    return {f"wgmma {types}"} if target >= 90 else {f"mma {types}.{last}"}


QUICK = [("int4:g128", None, 1, 80, "bf16"), ("int4:g128", None, 1, 90, "bf16"), ("int4:g128", INT8, 1, 80, "int8"),
         ("fp8:channel", FP8, 1, 89, "fp8"), ("int8:channel", INT8, 1, 90, "int8"), ("int4:g128", FP8, 1, 90, "fp8")]
SLOW = [(weight, activation, m, target, kind) for target in (80, 89, 90) for m in (1, 48, 4096)
        for weight, activation, kind in (
            ("int4:g128:asym", None, "bf16"), ("int4:g32", None, "bf16"), ("int4:channel", None, "bf16"),
            ("int8:g64", None, "bf16"), ("mxfp4:g32", None, "bf16"), ("nvfp4:g16", None, "bf16"),
            ("mxfp8:g32", None, "bf16"), ("nf4:g64", None, "bf16"), ("fp8:b128", None, "bf16"),
            ("int4:g64:asym", INT8_ASYM, "int8"), ("int4:g64:integer", INT8, "int8"), ("int8:channel", INT8, "int8"),
            ("int8:g128:asym", INT8, "int8"), ("fp8:b128", FP8_GROUPS, "fp8"), ("fp8:channel", FP8, "fp8"),
            ("int4:g128:asym", FP8, "fp8"), ("mxfp4:g32", FP8_GROUPS, "fp8")) if kind != "fp8" or target >= 89]


def ids(cases: list[tuple[str, ActivationArgs | None, int, int, str]]) -> list[str]:
    return [f"{w}-x-{a.number if a else 'float'}-m{m}-sm_{t}" for w, a, m, t, _ in cases]


def check(made: Compiled, kind: str, target: int, *, narrow: bool = False) -> None:
    assert products_of(kind, target) <= made.products(), made.products()
    wide = [name for name in made.instructions if name.startswith("cp.async.cg") or (
        name.startswith("ld.global") and ".v4." in name)]
    assert wide or narrow, f"no load of 16 bytes: {dict(made.instructions)}"
    if made.registers is not None:
        assert made.registers <= 255 and made.shared <= {80: 163, 89: 99, 90: 227}[target] << 10


@pytest.mark.parametrize(("weight", "activation", "m", "target", "kind"), QUICK, ids=ids(QUICK))
def test_compiles(weight: str, activation: ActivationArgs | None, m: int, target: int, kind: str) -> None:
    made = compiled(weight, activation, m, target)
    check(made, kind, target)
    assert not made.spilled, f"{made.spilled} bytes of stack"


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "activation", "m", "target", "kind"), SLOW, ids=ids(SLOW))
def test_compiles_every_format(weight: str, activation: ActivationArgs | None, m: int, target: int, kind: str) -> None:
    # Rows of 32 bytes a step, which is what groups of 32 and less allow: on sm_90 Triton loads 8 bytes at a time there.
    narrow = target >= 90 and weight.split(":")[1] in ("g16", "g32")
    check(compiled(weight, activation, m, target), kind, target, narrow=narrow)


def test_four_bits_are_unpacked_two_at_a_time() -> None:
    """A lop3 gives two bfloat16 (its pattern 0x43084308 stands in the program), and no shift of single nibbles does."""
    ptx = compiled("int4:g128", None, 1, 90).ptx
    assert "0x43084308" in ptx and "lop3.b32" in ptx
    assert "0xF0F0F0F0" in compiled("int4:g128", INT8, 1, 80).ptx


@pytest.mark.slow
def test_lists_and_float16_compile() -> None:
    for target in (80, 90):
        check(compiled("int4:g128:asym", None, 1, target, count=3), "bf16", target)
        check(compiled("int4:g128", None, 16, target, FP16), "fp16", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_experts_compile(target: int) -> None:
    made = make_product(spec_for(weight_args("int4:g128"), None, N, K), BF16)

    def run() -> None:
        packed = [fake(4, *t.shape, dtype=t.dtype) for t in made.packed]
        grouping = Grouping(slots=fake(64, dtype=torch.int32), owners=fake(4, dtype=torch.int32), places=2, block=16)
        assert len(packed) == len(names(made.spec))
        multiply(Rows(x=fake(8, K, dtype=BF16)), operands(packed, [None], [made.spec]), torch.float32, grouping)

    launch, = recorded(run, target)
    check(compile_launch(launch, target), "bf16", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_attention_compiles(target: int, cache_dtype: torch.dtype) -> None:
    def run() -> None:
        k = fake(2, 8, 1024, 128, dtype=cache_dtype)
        scale = fake(2, 8, 1024, dtype=torch.float32)
        attend_quantized(fake(2, 32, 1, 128, dtype=BF16), k, scale, k, scale, fake(2, dtype=torch.int32))

    launch, = recorded(run, target)
    made = compile_launch(launch, target)
    assert "mma f32.bf16.bf16.f32" in made.products() or "wgmma f32.bf16.bf16" in made.products()
