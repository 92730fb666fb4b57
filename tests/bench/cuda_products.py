"""Products on a GPU: each kernel beside what it is to beat, on rotating weights, in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cuda_goals import Goal
from cuda_time import Machine, interleaved
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.kernels.reference.activation import quantize_float8, quantize_symmetric
from qpass.kernels.registry import kernel
from tests.kernels.cuda.products import make_product, spec_for, weight_args

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
INT8, FP8 = ActivationArgs(), ActivationArgs(type="float")
FP8_GROUPS = ActivationArgs(type="float", granularity="per_group", group_size=128)


def shapes(machine: Machine) -> tuple[tuple[int, int], ...]:
    return ((48, 128),) if machine.dry else SHAPES


def rows(machine: Machine, many: int) -> int:
    return 3 if machine.dry else many


def ours(machine: Machine, name: str, text: str, activation: Any, n: int, k: int, x: Tensor, copies: int
         ) -> list[Callable[[], Any]]:
    """A call of kernel `name` for each of `copies` equal weights that lie apart in memory."""
    spec = spec_for(weight_args(text), activation, n, k, name)
    made = make_product(spec, torch.bfloat16, device=machine.device)
    form = kernel(name).forms["linear"]
    weights = [[tensor.clone() for tensor in made.packed] for _ in range(copies)]
    return [lambda w=w: form(x, w, None, spec) for w in weights]


def floats(machine: Machine, n: int, k: int, x: Tensor, copies: int) -> list[Callable[[], Any]]:
    weights = [torch.randn(n, k, device=machine.device).to(x.dtype) for _ in range(copies)]
    return [lambda w=w: F.linear(x, w) for w in weights]


def activation(machine: Machine, m: int, k: int) -> Tensor:
    return torch.randn(m, k, device=machine.device).to(torch.float16 if machine.dry else torch.bfloat16)


def report(where: str, times: dict[str, float]) -> dict[str, float]:
    print(f"    {where}: " + ", ".join(f"{name} {took:.1f} us" for name, took in times.items()), flush=True)
    return {name: round(took, 2) for name, took in times.items()}


def w4a16(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    copy = found["stages"].get("bandwidth", {}).get("result", {}).get("copy_gb_s", 0.0)
    result = {}
    for m, asked in ((1, 3.2), (16, 2.8)):
        ratios = []
        for n, k in shapes(machine):
            x = activation(machine, m, k)
            lanes = {"ours": ours(machine, "linear_w4a16_triton", "int4:g128", None, n, k, x,
                                  machine.copies(n * k // 2)),
                     "bf16": floats(machine, n, k, x, machine.copies(n * k * 2))}
            times = interleaved(machine, lanes)
            result[f"{m} x {n}x{k}"] = report(f"W4A16 M={m} {n}x{k}", times)
            ratios.append(times["bf16"] / times["ours"])
            if m == 1 and (n, k) == shapes(machine)[-1] and copy:
                read = n * k * (0.5 + 2 / 128) / times["ours"] / 1000
                Goal(what=f"W4A16 M=1 {n}x{k}, of the bandwidth", against="a copy", asked=0.8,
                     found=read / copy).put(found)
        Goal(what=f"W4A16 M={m}, least of {len(ratios)} shapes", against="torch bf16", asked=asked,
             found=min(ratios)).put(found)
    return result


def _large(machine: Machine, lanes: Callable[[int, int, Tensor], dict[str, Any]], what: str) -> dict[str, Any]:
    """Times at 4096 rows, of the middle two shapes."""
    result = {}
    for n, k in shapes(machine)[:3]:
        x = activation(machine, rows(machine, 4096), k)
        result[f"{n}x{k}"] = report(f"{what} M={x.shape[0]} {n}x{k}", interleaved(machine, lanes(n, k, x)))
    return result


def _least(result: dict[str, Any], ours: str, peer: str) -> float:
    return min(float(times[peer] / times[ours]) for times in result.values())


def fp8(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    def scaled(n: int, k: int, x: Tensor) -> Callable[[], Any]:
        weight = torch.randn(n, k, device=machine.device).to(torch.float8_e4m3fn)
        columns = torch.rand(1, n, device=machine.device)

        def run() -> Tensor:
            codes, scale = quantize_float8(x)
            return torch._scaled_mm(codes, weight.t(), scale_a=scale, scale_b=columns, out_dtype=x.dtype)

        return run

    def lanes(n: int, k: int, x: Tensor) -> dict[str, Any]:
        made = {"ours": ours(machine, "linear_fp8_w8afp8_triton", "fp8:channel", FP8, n, k, x, 1),
                "bf16": floats(machine, n, k, x, 1)}
        if not machine.dry:
            made["ours scaled_mm"] = ours(machine, "linear_fp8_w8afp8_scaled_mm", "fp8:channel", FP8, n, k, x, 1)
            made["scaled_mm, eager quantization"] = [scaled(n, k, x)]
        return made

    result = _large(machine, lanes, "FP8")
    best = "ours" if machine.dry or _least(result, "ours", "ours scaled_mm") >= 1 else "ours scaled_mm"
    peers = (("bf16", 1.6),) if machine.dry else (("scaled_mm, eager quantization", 1.15), ("bf16", 1.6))
    for peer, asked in peers:
        Goal(what=f"W8A8 fp8 M=4096 ({best})", against=peer, asked=asked, found=_least(result, best, peer)).put(found)
    return result


def int8(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    def compiled(n: int, k: int, x: Tensor) -> Callable[[], Any]:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=machine.device)
        columns = torch.rand(n, device=machine.device)

        def run(x: Tensor) -> Tensor:
            codes, scale = quantize_symmetric(x)
            return (torch._int_mm(codes, weight.t()).float() * scale * columns).to(x.dtype)

        fast = run if machine.dry else torch.compile(run)
        return lambda: fast(x)

    def lanes(n: int, k: int, x: Tensor) -> dict[str, Any]:
        made = {"ours": ours(machine, "linear_w8a8_triton", "int8:channel", INT8, n, k, x, 1),
                "ours int_mm": ours(machine, "linear_w8a8_int_mm", "int8:channel", INT8, n, k, x, 1)}
        if not machine.dry:
            made["int_mm compiled"] = [compiled(n, k, x)]
        return made

    result = _large(machine, lanes, "INT8")
    peer = "ours int_mm" if machine.dry else "int_mm compiled"
    Goal(what="W8A8 int8 M=4096", against=peer, asked=1.0, found=_least(result, "ours", peer)).put(found)
    return result


def w4a8(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    def lanes(n: int, k: int, x: Tensor) -> dict[str, Any]:
        return {"ours": ours(machine, "linear_w4a8_triton", "int4:g128:integer", INT8, n, k, x, 1),
                "ours, float scales": ours(machine, "linear_w4a8_triton", "int4:g128", INT8, n, k, x, 1),
                "bf16": floats(machine, n, k, x, 1)}

    result = _large(machine, lanes, "W4A8")
    Goal(what="W4A8 int8 M=4096, integer scales", against="torch bf16", asked=1.3,
         found=_least(result, "ours", "bf16")).put(found)
    few = {}
    for n, k in shapes(machine):
        x, copies = activation(machine, rows(machine, 16), k), machine.copies(n * k // 2)
        few[f"{n}x{k}"] = report(f"W4A8 M={x.shape[0]} {n}x{k}", interleaved(machine, {
            "ours": ours(machine, "linear_w4a8_triton", "int4:g128", INT8, n, k, x, copies),
            "ours w4a16": ours(machine, "linear_w4a16_triton", "int4:g128", None, n, k, x, copies)}))
    Goal(what="W4A8 int8 M=16", against="our W4A16", asked=1.0, found=_least(few, "ours", "ours w4a16")).put(found)
    return result | {"few rows": few}


def fp8_block(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    def lanes(n: int, k: int, x: Tensor) -> dict[str, Any]:
        return {"ours": ours(machine, "linear_fp8_w8afp8_triton", "fp8:b128", FP8_GROUPS, n, k, x, 1),
                "bf16": floats(machine, n, k, x, 1)}

    result = _large(machine, lanes, "FP8 blocks")
    Goal(what="fp8 block M=4096", against="torch bf16", asked=1.4, found=_least(result, "ours", "bf16")).put(found)
    return result
