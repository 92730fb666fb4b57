"""Weight bytes: a spec in; what weights of it take on disk, and in memory as their kernel wants them, out."""

from __future__ import annotations

import math

from qpass.dtype import DType, itemsize
from qpass.kernels.registry import kernel
from qpass.scheme import RowCodec, codec_of
from qpass.spec import LinearSpec


def stored_bytes(spec: LinearSpec, count: int, scale: int) -> int:
    """Bytes of `count` weights [N, K] on disk: codes packed, scales of `scale` bytes where that is open, zero points
    packed."""
    codec, rows, w = codec_of(spec.weight), spec.out_features * count, spec.weight
    if isinstance(codec, RowCodec):
        tensors = codec.stored(w, spec.shape).values()
        return count * sum(_chosen(dtypes, scale) * math.prod(shape) for dtypes, shape in tensors)
    scales = count if w.granularity == "per_tensor" else rows * spec.groups
    zero_points = 0 if w.symmetric else -(-scales * w.bits // 8)
    return rows * _row(spec, w.bits) + scales * scale + zero_points


def packed_bytes(spec: LinearSpec, count: int, scale: int) -> int:
    """The same in memory, in the layout of the kernel that `spec` names, but for what that pads."""
    bits = kernel(spec.kernel).layout.bits
    wider = 0 if bits is None else _row(spec, bits(spec)) - _row(spec, spec.weight.bits)
    return stored_bytes(spec, count, scale) + count * spec.out_features * wider


def _row(spec: LinearSpec, bits: int) -> int:
    return -(-spec.in_features * bits // 8)


def _chosen(dtypes: tuple[DType, ...], scale: int) -> int:
    sizes = [itemsize(dtype) for dtype in dtypes]
    return scale if scale in sizes else sizes[0]
