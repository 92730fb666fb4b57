"""Lanes of OpenVINO: a graph of independent products, one for each copy of a compressed weight, asked for as a whole.

Names are `w<bits>_<g128 or channel>_dq<size>`: dq is DYNAMIC_QUANTIZATION_GROUP_SIZE, how many inputs share a scale
when they are rounded to int8; dq0 leaves them float. Float is float32 unless the machine has bfloat16 instructions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
from lane import (
    FEW,
    FLOAT_INPUT,
    ROUNDED_INPUT,
    SMALL,
    Call,
    Floats,
    Lane,
    copies_for,
    multiplied_out,
    round_to_nearest,
)
from worker import serve

VARIANTS = ("w4_g128_dq128", "w4_g128_dq0", "w8_channel_dq32")
CORE = ov.Core()


def lane(name: str, weights: Sequence[Floats], rotate: int) -> Lane:
    """Graphs of FEW copies and of as many as fill `rotate`, each compiled when first needed."""
    bits_, granularity, dq = name.split("_")
    n, k = weights[0].shape
    bits, group = int(bits_[1:]), k if granularity == "channel" else int(granularity[1:])
    codes, scale = round_to_nearest(weights[0], bits, group)
    nbytes = n * k * bits / 8 + scale.size * 2
    made: dict[int, Any] = {}

    def calls(m: int) -> list[Call]:
        copies = copies_for(nbytes, rotate) if m <= SMALL else FEW
        if copies not in made:
            made[copies] = _compiled(codes, scale, bits, copies, int(dq[2:])).create_infer_request()
        request = made[copies]

        def call(x: Any) -> Any:
            request.set_input_tensor(x)
            request.infer()
            return [request.get_output_tensor(i).data for i in range(copies)]

        return [call]

    return Lane(calls=calls, take=lambda x: ov.Tensor(np.ascontiguousarray(x)),
                give=lambda y, rows: [np.array(one[rows]) for one in y],
                weight=multiplied_out(codes, scale.astype(np.float16).astype(np.float32)), nbytes=nbytes,
                tolerance=FLOAT_INPUT if dq == "dq0" else ROUNDED_INPUT,
                together=lambda m: copies_for(nbytes, rotate) if m <= SMALL else FEW)


def _compiled(codes: Any, scale: Floats, bits: int, copies: int, dq: int) -> Any:
    x = op.parameter([-1, codes.shape[1]], ov.Type.f32, "x")
    outs = [op.result(op.matmul(x, _weight(codes, scale, bits), False, True)) for _ in range(copies)]
    settings = {"INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
                "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(dq),
                "INFERENCE_PRECISION_HINT": "bf16" if dq == 0 and _has_bf16() else "f32"}
    return CORE.compile_model(ov.Model(outs, [x]), "CPU", settings)


def _weight(codes: Any, scale: Floats, bits: int) -> Any:
    """As its converters write a compressed weight: codes, scales in float16; symmetric int4 as u4 with zero point 8."""
    (n, k), groups = codes.shape, scale.shape[1]
    if bits == 4:
        tensor = ov.Tensor(ov.Type.u4, ov.Shape([n, groups, k // groups]))
        unsigned = (codes + 8).astype(np.uint8).reshape(-1, 2)
        tensor.data.reshape(-1)[:] = unsigned[:, 0] | unsigned[:, 1] << 4
        wide = op.convert(op.constant(tensor), "f16")
        wide = op.subtract(wide, op.convert(op.constant(np.array(8, np.uint8)), "f16"))
    else:
        wide = op.convert(op.constant(codes.reshape(n, groups, k // groups).copy()), "f16")
    scaled = op.multiply(wide, op.constant(scale.astype(np.float16)[..., None]))
    return op.convert(op.reshape(scaled, op.constant(np.array([n, k])), False), "f32")


def _has_bf16() -> bool:
    try:
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    except OSError:
        return False


if __name__ == "__main__":
    serve({name: partial(lane, name) for name in VARIANTS}, lambda: {"OpenVINO": ov.__version__.split("-")[0]})
