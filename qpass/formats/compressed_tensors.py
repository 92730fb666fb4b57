"""compressed-tensors: the names and packing a quantized weight has on disk and in `state_dict()`.

Source: compressed-tensors 0.20, `compressors/pack_quantized` and `compressors/naive_quantized`.
pack-quantized  `weight_packed` int32 (dense words along K), `weight_scale` [N, G], `weight_shape` int64 [2], and for
                asymmetric weights `weight_zero_point` int32, packed along N
int-quantized   `weight` int8 [N, K], `weight_scale` [N, 1]: 8-bit weights whose activations are quantized too
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.formats.bits import pack_rows, unpack_rows
from qpass.scheme import codec_of
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight


def is_packed(spec: LinearSpec) -> bool:
    """Whether this weight is written pack-quantized (else int-quantized)."""
    return not (spec.weight.bits == 8 and spec.activation is not None)


def names_on_disk(spec: LinearSpec) -> tuple[str, ...]:
    """The tensor names of one weight, without the layer's path."""
    codec = codec_of(spec.weight)
    if codec is not None:
        return tuple(f"weight_{name}" for name in codec.names)
    zero_point = () if spec.weight.symmetric else ("weight_zero_point",)
    if is_packed(spec):
        return ("weight_packed", "weight_scale", "weight_shape", *zero_point)
    return ("weight", "weight_scale", *zero_point)


def write_weight(weight: CanonicalWeight, spec: LinearSpec) -> dict[str, Tensor]:
    """A canonical weight as named tensors for disk."""
    if codec_of(spec.weight) is not None:
        return {f"weight_{name}": tensor for name, tensor in weight.tensors.items()}
    bits, scale = spec.weight.bits, weight.scale
    written = {"weight_scale": scale[:1].reshape(1) if spec.weight.granularity == "per_tensor" else scale}
    if is_packed(spec):
        written["weight_packed"] = pack_rows(weight.qweight, bits)
        written["weight_shape"] = torch.tensor([spec.out_features, spec.in_features], dtype=torch.int64)
    else:
        written["weight"] = weight.qweight
    if weight.zero_point is not None:
        packed = pack_rows(weight.zero_point.t().contiguous(), bits).t().contiguous() if is_packed(spec) else None
        written["weight_zero_point"] = weight.zero_point if packed is None else packed
    return {name: written[name] for name in names_on_disk(spec)}


def read_weight(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    """The inverse of write_weight. Raises ValueError, saying which tensor, where shapes or dtypes disagree with `spec`."""
    codec = codec_of(spec.weight)
    if codec is not None:
        return CanonicalWeight({name: tensors[f"weight_{name}"] for name in codec.names})
    n, k, groups, bits = spec.out_features, spec.in_features, spec.groups, spec.weight.bits
    if is_packed(spec):
        if (said := tensors["weight_shape"].tolist()) != [n, k]:
            raise ValueError(f"weight_shape says {said}, the layer is {[n, k]}")
        if tensors["weight_packed"].shape[0] != n:
            raise ValueError(f"weight_packed has {tensors['weight_packed'].shape[0]} rows, the layer has {n}")
        q = unpack_rows(tensors["weight_packed"], bits, k)
    else:
        q = tensors["weight"]
        if q.dtype != torch.int8 or tuple(q.shape) != (n, k):
            raise ValueError(f"weight is {q.dtype} {tuple(q.shape)}, expected int8 {(n, k)}")
    scale = tensors["weight_scale"]
    if not scale.is_floating_point():
        raise ValueError(f"weight_scale is {scale.dtype}, expected a floating dtype")
    if spec.weight.granularity == "per_tensor":
        scale = scale.reshape(1, 1).expand(n, 1).contiguous()
    if tuple(scale.shape) != (n, groups):
        raise ValueError(f"weight_scale is {tuple(scale.shape)}, expected {(n, groups)} for {spec}")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("weight_scale holds NaN or Inf")
    found = {"qweight": q, "scale": scale}
    if not spec.weight.symmetric:
        zero_point = tensors["weight_zero_point"]
        if is_packed(spec):
            zero_point = unpack_rows(zero_point.t().contiguous(), bits, n).t().contiguous()
        if zero_point.dtype != torch.int8 or tuple(zero_point.shape) != (n, groups):
            raise ValueError(f"weight_zero_point is {zero_point.dtype} {tuple(zero_point.shape)}, "
                             f"expected int8 {(n, groups)}")
        found["zero_point"] = zero_point
    return CanonicalWeight(found)
