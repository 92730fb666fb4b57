"""Lanes of PyTorch itself: bfloat16, and each integer product that it has for CPUs, in this environment's version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lane import (
    FEW,
    FLOAT_INPUT,
    ROUNDED_INPUT,
    SMALL,
    Call,
    Floats,
    Lane,
    copies_for,
    few_or_all,
    multiplied_out,
    round_to_nearest,
)
from torch import Tensor
from worker import Refused, serve

GROUP = 128


def _lane(calls: Callable[[int], Sequence[Call]], weight: Floats, nbytes: float, tolerance: float,
          take: Callable[[Tensor], Any] = Tensor.bfloat16, back: Callable[[Tensor], Tensor] = Tensor.float) -> Lane:
    return Lane(calls=calls, take=lambda x: take(torch.from_numpy(x)), weight=weight, nbytes=nbytes,
                give=lambda y, rows: [back(y[rows]).numpy()], tolerance=tolerance)


def _clones(tensor: Tensor, nbytes: float, rotate: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(copies_for(nbytes, rotate) - 1))]


def bf16(weights: Sequence[Floats], rotate: int) -> Lane:
    held = torch.from_numpy(weights[0]).bfloat16()
    copies = _clones(held, held.nbytes, rotate)
    return _lane(few_or_all([lambda x, w=w: F.linear(x, w) for w in copies]), held.float().numpy(), held.nbytes,
                 FLOAT_INPUT)


def int4pack(weights: Sequence[Floats], rotate: int) -> Lane:
    """`aten._weight_int4pack_mm_for_cpu`: weight-only int4 in groups of 128, asymmetric."""
    n, k = weights[0].shape
    groups = torch.from_numpy(weights[0]).view(n, k // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = ((groups - low[..., None]) / scale.float()[..., None]).round().clamp(0, 15).to(torch.int32)
    held = (q - 8).float() * scale.float()[..., None] + zero.float()[..., None]
    pairs = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.view(n, k), 1)
    nbytes = n * k / 2 + pairs.nbytes
    call = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _lane(few_or_all([lambda x, w=w: call(x, w, GROUP, pairs) for w in _clones(packed, nbytes, rotate)]),
                 held.view(n, k).numpy(), nbytes, FLOAT_INPUT)


def int8pack(weights: Sequence[Floats], rotate: int) -> Lane:
    """`aten._weight_int8pack_mm`: weight-only int8 per channel."""
    codes, scale = round_to_nearest(weights[0], 8, weights[0].shape[1])
    q, s = torch.from_numpy(codes), torch.from_numpy(scale[:, 0]).bfloat16()
    call = torch.ops.aten._weight_int8pack_mm
    return _lane(few_or_all([lambda x, w=w: call(x, w, s) for w in _clones(q, q.nbytes, rotate)]),
                 multiplied_out(codes, scale), q.nbytes, FLOAT_INPUT)


def int_mm(weights: Sequence[Floats], rotate: int) -> Lane:
    """`aten._int_mm` alone: int8 times int8 to int32; neither the rounding of the input nor a scale is in the time."""
    codes, scale = round_to_nearest(weights[0], 8, weights[0].shape[1])
    q, s = torch.from_numpy(codes), torch.from_numpy(scale[:, 0])
    step = 1 / 24
    return _lane(few_or_all([lambda x, w=w: torch._int_mm(x, w.t()) for w in _clones(q, q.nbytes, rotate)]),
                 multiplied_out(codes, scale), q.nbytes, ROUNDED_INPUT,
                 take=lambda x: (x / step).round().clamp(-127, 127).to(torch.int8), back=lambda y: y.float() * s * step)


def qlinear(weights: Sequence[Floats], rotate: int) -> Lane:
    """oneDNN's W8A8 as Inductor emits it, input already uint8 with one static scale; bfloat16 out, or float32 where
    the processor has no bfloat16 instructions and oneDNN would compute such an output one number at a time."""
    codes, scale = round_to_nearest(weights[0], 8, weights[0].shape[1])
    q, s = torch.from_numpy(codes), torch.from_numpy(scale[:, 0])
    zero, step = torch.zeros(len(s), dtype=torch.int32), 1 / 24
    call = torch.ops.onednn.qlinear_pointwise
    out = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32

    packed: dict[bool, list[Tensor]] = {}

    def calls(m: int) -> list[Call]:
        small = m <= SMALL
        if small not in packed:  # the shape of x that it is packed for is a hint
            copies = copies_for(q.nbytes, rotate) if small else FEW
            packed[small] = [torch.ops.onednn.qlinear_prepack(q.clone(), [m, q.shape[1]]) for _ in range(copies)]
        return [lambda x, w=w: call(x, step, 128, w, s, zero, None, 1.0, 0, out, "none", [], "")
                for w in packed[small]]

    return _lane(calls, multiplied_out(codes, scale), q.nbytes, ROUNDED_INPUT,
                 take=lambda x: (x / step + 128).round().clamp(0, 255).to(torch.uint8))


def inductor_w8a8(weights: Sequence[Floats], rotate: int) -> Lane:
    """Rounding per token, `_int_mm`, scales: compiled with max-autotune and freezing, which picks its own template."""
    if not torch.cpu._is_amx_tile_supported():
        raise Refused("its int8 template is for AMX, which this machine has not")
    import torch._inductor.config as inductor

    inductor.freezing = True
    codes, scale = round_to_nearest(weights[0], 8, weights[0].shape[1])
    s = torch.from_numpy(scale[:, 0])

    class Product(torch.nn.Module):
        def __init__(self, q: Tensor) -> None:
            super().__init__()
            self.register_buffer("q", q)

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            step = wide.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
            rounded = (wide / step).round().clamp(-127, 127).to(torch.int8)
            return (torch._int_mm(rounded, self.q.t()).float() * step * s).to(x.dtype)

    def calls(m: int) -> list[Call]:
        if m <= 16:
            raise Refused("compiled with freezing it holds one copy of its weights, which would come from the cache")
        torch._dynamo.reset()
        made = torch.compile(Product(torch.from_numpy(codes)).eval(), mode="max-autotune", dynamic=False)
        return [made]

    return _lane(calls, multiplied_out(codes, scale), codes.nbytes, ROUNDED_INPUT)


VARIANTS = {"bf16": bf16, "int4pack_w4a16": int4pack, "int8pack_w8a16": int8pack, "int_mm": int_mm,
            "onednn_w8a8_static": qlinear, "inductor_w8a8": inductor_w8a8}


def versions() -> dict[str, str]:
    return {"PyTorch": torch.__version__}


if __name__ == "__main__":
    with torch.no_grad():
        serve({name: partial(make) for name, make in VARIANTS.items()}, versions)
