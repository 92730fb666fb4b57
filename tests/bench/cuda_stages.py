"""Stages of the CUDA benchmark: each a function that checks or times something and notes the goals that it measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_experts
import cuda_model
import cuda_products
import torch
from cuda_time import Machine, bandwidth

from qpass.kernels.cuda.attention import attend_quantized
from qpass.kernels.registry import KERNELS, Kernel, LinearCall, load_builtin
from tests.kernels.cuda.products import activation_rows, make_product, spec_for, weight_args, worst_error

# weight, activation name, and the kernels' scheme
CHECKS = {
    "w4a16": ("int4:g128", "int4:g32:asym", "int4:g64", "int4:channel"), "w8a16": ("int8:channel", "int8:g32:asym"),
    "w4a8": ("int4:g128", "int4:g64:integer", "int4:g32:asym", "int4:channel"), "w8a8": ("int8:channel", "int8:g64"),
    "w4afp8": ("int4:g128", "int4:g64:asym"), "fp8_w8afp8": ("fp8:channel", "fp8:tensor", "fp8:b128"),
    "mxfp4_w4afp8": ("mxfp4:g32",), "fp8_w8a16": ("fp8:channel", "fp8:b128"), "mxfp4_w4a16": ("mxfp4:g32",),
    "nvfp4_w4a16": ("nvfp4:g16",), "nvfp4_mul_w4a16": ("nvfp4_mul:g16",),
    "nvfp4_reciprocal_w4a16": ("nvfp4_reciprocal:g16",), "mxfp8_w8a16": ("mxfp8:g32",), "nf4_w4a16": ("nf4:g64",),
    "fp4_w4a16": ("fp4:g64",),
}


def stages(machine: Machine, found: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The stages in order: what is right comes before what is fast, and the whole model last."""
    return {
        "bandwidth": lambda: {"copy_gb_s": round(bandwidth(machine), 1)},
        "check": lambda: check_linears(machine),
        "check_experts": lambda: cuda_experts.check(machine),
        "check_attention": lambda: check_attention(machine),
        "w4a16": lambda: cuda_products.w4a16(machine, found),
        "fp8": lambda: cuda_products.fp8(machine, found),
        "int8": lambda: cuda_products.int8(machine, found),
        "w4a8": lambda: cuda_products.w4a8(machine, found),
        "fp8_block": lambda: cuda_products.fp8_block(machine, found),
        "experts": lambda: cuda_experts.decode(machine, found),
        "model": lambda: cuda_model.decode(machine, found),
    }


def activations_of(scheme: str) -> list[Any]:
    from qpass.activation_args import ActivationArgs

    if scheme.endswith("a16"):
        return [None]
    if scheme.endswith("afp8"):
        return [ActivationArgs(type="float"), ActivationArgs(type="float", granularity="per_group", group_size=128)]
    return [ActivationArgs(), ActivationArgs(symmetric=False)]


def check_linears(machine: Machine) -> dict[str, Any]:
    """Every linear kernel for CUDA, in each dtype, at few and many rows and odd sizes, against float64."""
    load_builtin()
    agree, differ, errors = [], [], {}
    for kernel in [k for k in KERNELS.values() if k.device == "cuda" and k.op == "linear"]:
        worst, why = 0.0, ""
        try:
            for text in CHECKS[kernel.scheme]:
                for activation in activations_of(kernel.scheme):
                    worst = max(worst, _check_one(machine, kernel, text, activation))
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:300]}"
        good = not why and worst <= 1
        (agree if good else differ).append(kernel.name)
        errors[kernel.name] = why or round(worst, 4)
        if not good:
            print(f"    {kernel.name}: {why or f'error {worst:.3g} times what is allowed'}", flush=True)
    print(f"    {len(agree)} kernels agree with the reference, {len(differ)} do not", flush=True)
    return {"agree": agree, "differ": differ, "worst_or_error": errors}


def _check_one(machine: Machine, kernel: Kernel, text: str, activation: Any) -> float:
    dtypes = (torch.float16,) if machine.dry else (torch.bfloat16, torch.float16, torch.float32)
    sizes = ((33, 128, 3),) if machine.dry else ((1000, 640, 1), (333, 1152, 17), (520, 768, 300))
    worst = 0.0
    for dtype in dtypes:
        spec = spec_for(weight_args(text), activation, 8, 768, kernel.name)
        call = LinearCall(spec=spec, device=torch.device("cuda"), dtype=dtype)
        if kernel.takes(call) is not None:
            continue
        for n, k, m in sizes:
            made = make_product(spec_for(weight_args(text), activation, n, k, kernel.name), dtype,
                                device=machine.device)
            x = torch.randn(m, k, device=machine.device).to(dtype)
            bias = torch.randn(n, device=machine.device) if m % 2 else None
            y = kernel.forms["linear"](x, made.packed, bias, made.spec)
            worst = max(worst, worst_error(y, activation_rows(x, activation)[1], made, bias))
    return worst


def check_attention(machine: Machine) -> dict[str, Any]:
    """Attention over int8 and float8 caches, against float64."""
    worst = {}
    keys, size = (70, 32) if machine.dry else (4000, 128)
    for cache in (torch.int8, torch.float8_e4m3fn):
        if cache != torch.int8 and not machine.dry and torch.cuda.get_device_capability() < (8, 9):
            continue
        for queries in (1, 5):
            k, v = (torch.randn(2, 2, keys, size, device=machine.device) for _ in range(2))
            largest = 127 if cache == torch.int8 else 448
            ks, vs = (t.abs().amax(-1) / largest for t in (k, v))
            kq, vq = ((t / s[..., None]).round() if cache == torch.int8 else t / s[..., None]
                      for t, s in ((k, ks), (v, vs)))
            kq, vq = kq.to(cache), vq.to(cache)
            q = torch.randn(2, 8, queries, size, device=machine.device).half()
            lengths = torch.tensor([keys, keys // 2], device=machine.device)
            got = attend_quantized(q, kq, ks, vq, vs, lengths)
            full_k = (kq.double() * ks.double()[..., None]).repeat_interleave(4, 1)
            full_v = (vq.double() * vs.double()[..., None]).repeat_interleave(4, 1)
            score = q.double() @ full_k.transpose(-1, -2) / size**0.5
            place = lengths[:, None] - queries + torch.arange(queries, device=machine.device)
            seen = torch.arange(keys, device=machine.device)[None, None] <= place[..., None]
            want = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ full_v
            error = float((got.double() - want).abs().max() / want.abs().max())
            worst[f"{str(cache)[6:]}-{queries}"] = error
            if error > 2e-3:
                raise AssertionError(f"attention over {cache}, {queries} queries: relative error {error:.2e}")
    return worst
