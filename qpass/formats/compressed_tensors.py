"""compressed-tensors: the names and packing a quantized weight has on disk and in `state_dict()`.

Source: compressed-tensors 0.20, `compressors/pack_quantized` and `compressors/naive_quantized`.
pack-quantized  `weight_packed` int32 (dense words along K), `weight_scale` [N, G], `weight_shape` int64 [2], and for
                asymmetric weights `weight_zero_point` int32, packed along N
int-quantized   `weight` int8 [N, K], `weight_scale` [N, 1] or [N, G], `weight_zero_point` int8 [N, G] if asymmetric

A static activation scale stands beside either: `input_scale` [1], and `input_zero_point` int8 [1] if asymmetric.

8-bit weights whose activations are quantized too are written int-quantized, everything else pack-quantized; either is
read for any scheme, for the tools disagree over it (LLM Compressor 0.14 writes W4A8 int-quantized).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from qpass.activation_scale import scale_names
from qpass.dtype import torch_dtype
from qpass.formats.bits import pack_rows, unpack_loose, unpack_rows
from qpass.formats.integer_weights import checked_scale, group_order
from qpass.scheme import RowCodec, codec_of, tensor_on_disk
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor


def is_packed(spec: LinearSpec) -> bool:
    """Whether this weight is written pack-quantized (else int-quantized)."""
    return not (spec.weight.bits == 8 and spec.activation is not None)


def names_on_disk(spec: LinearSpec, *, packed: bool | None = None) -> tuple[str, ...]:
    """The tensor names of one layer, without its path: the weight's, then those of a static activation scale.

    `packed` overrides is_packed, for reading.
    """
    codec, static = codec_of(spec.weight), scale_names(spec.activation)
    if codec is not None:
        return (*(tensor_on_disk(name) for name in codec.names), *static)
    zero_point = () if spec.weight.symmetric else ("weight_zero_point",)
    if is_packed(spec) if packed is None else packed:
        return ("weight_packed", "weight_scale", "weight_shape", *zero_point, *static)
    return ("weight", "weight_scale", *zero_point, *static)


def names_found(spec: LinearSpec, present: Callable[[str], bool]) -> tuple[str, ...]:
    """The names to read one weight from: those of the form that is there, or of the form that would be written."""
    if present("weight_packed") or codec_of(spec.weight) is not None:
        return names_on_disk(spec, packed=True)
    return names_on_disk(spec, packed=False if present("weight") else None)


def describe_weight(weight: CanonicalWeight, spec: LinearSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of what write_weight gives, without packing anything: the weight's tensors only.

    `weight` may hold a layout's tensors instead; of them the dtype of `scale` counts.
    """
    codec = codec_of(spec.weight)
    if isinstance(codec, RowCodec) and codec.names[0] not in weight.tensors:
        return {tensor_on_disk(name): (weight.scale.dtype if name == "scale" else torch_dtype(dtypes[0]), shape)
                for name, (dtypes, shape) in codec.stored(spec.weight, spec.shape).items()}
    if codec is not None:
        return {tensor_on_disk(name): (tensor.dtype, tuple(tensor.shape)) for name, tensor in weight.tensors.items()}
    n, k, groups, bits = spec.out_features, spec.in_features, spec.groups, spec.weight.bits
    scale = (1,) if spec.weight.granularity == "per_tensor" else (n, groups)
    zero_point = (-(-n * bits // 32), groups) if is_packed(spec) else (n, groups)
    every: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.int8, (n, k)), "weight_packed": (torch.int32, (n, -(-k * bits // 32))),
        "weight_scale": (weight.scale.dtype, scale), "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32 if is_packed(spec) else torch.int8, zero_point)}
    return {name: every[name] for name in names_on_disk(spec) if name in every}


def write_weight(weight: CanonicalWeight, spec: LinearSpec) -> dict[str, Tensor]:
    """A canonical weight as named tensors for disk."""
    if codec_of(spec.weight) is not None:
        return {tensor_on_disk(name): tensor for name, tensor in weight.tensors.items()}
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
    return {name: written[name] for name in names_on_disk(spec) if name in written}


def read_weight(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
    """The inverse of write_weight, from either form: tensors named as by names_found.

    Raises ValueError, saying which tensor, where shapes, dtypes or values disagree with `spec`.
    """
    codec = codec_of(spec.weight)
    if codec is not None:
        named = {name: tensors[tensor_on_disk(name)] for name in codec.names}
        if isinstance(codec, RowCodec):
            codec.check(named, spec.weight, spec.shape)
        return CanonicalWeight(named)
    found = {"qweight": _read_codes(tensors, spec), "scale": _read_scale(tensors["weight_scale"], spec)}
    if "weight_zero_point" in tensors or not spec.weight.symmetric:
        zero_point = _read_zero_point(tensors["weight_zero_point"], spec)
        if not spec.weight.symmetric:
            found["zero_point"] = zero_point
        elif bool(zero_point.any()):
            raise ValueError("weight_zero_point is not 0 everywhere, and the config calls the weight symmetric")
    if "weight_g_idx" in tensors and (order := group_order(tensors["weight_g_idx"], spec)) is not None:
        found["qweight"], found["input_order"] = found["qweight"][:, order.long()].contiguous(), order
    if "pre_quant_scale" in tensors:
        found["pre_scale"] = tensors["pre_quant_scale"]
    return CanonicalWeight(found)


def read_rows(tensors: dict[str, Tensor], some: LinearSpec, spec: LinearSpec) -> CanonicalWeight:
    """read_weight of some rows, of a symmetric weight in integers, from these rows of its codes and scales."""
    if "weight_shape" in tensors:
        _check_shape(tensors["weight_shape"], spec)
        tensors = {**tensors, "weight_shape": torch.tensor(some.shape)}
    return read_weight(tensors, some)


def _check_shape(said: Tensor, spec: LinearSpec) -> None:
    if said.tolist() != list(spec.shape):
        raise ValueError(f"weight_shape says {said.tolist()}, the layer is {list(spec.shape)}")


def _read_zero_point(zero_point: Tensor, spec: LinearSpec) -> Tensor:
    """int8 [N, G], from words packed along N or, as int-quantized and versions before 0.9 have it, from itself."""
    groups = (spec.out_features, spec.groups)
    if zero_point.dtype == torch.int32:
        try:
            zero_point = _unpack(zero_point.t().contiguous(), spec.weight.bits, spec.out_features).t().contiguous()
        except ValueError as error:
            raise ValueError(f"weight_zero_point, packed along rows: {error}") from error
    if zero_point.dtype != torch.int8 or zero_point.numel() not in (1, spec.out_features * spec.groups):
        raise ValueError(f"weight_zero_point is {zero_point.dtype} {tuple(zero_point.shape)}, expected int8 {groups}")
    _check_range(zero_point, spec, "weight_zero_point")
    return zero_point.expand(groups).contiguous() if zero_point.numel() == 1 else zero_point.reshape(groups)


def _read_codes(tensors: dict[str, Tensor], spec: LinearSpec) -> Tensor:
    n, k = spec.out_features, spec.in_features
    if "weight_packed" in tensors:
        _check_shape(tensors["weight_shape"], spec)
        if tensors["weight_packed"].shape[0] != n:
            raise ValueError(f"weight_packed has {tensors['weight_packed'].shape[0]} rows, the layer has {n}")
        return _unpack(tensors["weight_packed"], spec.weight.bits, k)
    q = tensors["weight"]
    if q.dtype != torch.int8 or tuple(q.shape) != (n, k):
        raise ValueError(f"weight is {q.dtype} {tuple(q.shape)}, expected int8 {(n, k)}")
    _check_range(q, spec, "weight")
    return q


def _unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """Either packing: values that straddle words, or (older files) as many whole ones as a word holds."""
    if packed.dim() == 2 and packed.shape[1] == words_of(bits, k)[1] != words_of(bits, k)[0]:
        return unpack_loose(packed, bits, k)
    return unpack_rows(packed, bits, k)


def words_of(bits: int, k: int) -> tuple[int, int]:
    """int32 words of a row of k values: packed densely, and as older versions packed what does not divide 32."""
    return -(-k * bits // 32), -(-k // (32 // bits))


def _read_scale(scale: Tensor, spec: LinearSpec) -> Tensor:
    groups = (spec.out_features, spec.groups)
    if not scale.is_floating_point() or scale.element_size() < 2:
        raise ValueError(f"weight_scale is {scale.dtype}, expected float16, bfloat16 or float32")
    if spec.weight.granularity == "per_tensor" and scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(groups).contiguous()
    if tuple(scale.shape) != groups:
        raise ValueError(f"weight_scale is {tuple(scale.shape)}, expected {groups} for {spec.group_size} weights a "
                         f"scale")
    return checked_scale(scale, "weight_scale")


def _check_range(codes: Tensor, spec: LinearSpec, name: str) -> None:
    """Codes stored one a byte may be out of the range that kernels count on."""
    half = 1 << spec.weight.bits - 1
    if spec.weight.bits < 8 and codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise ValueError(f"{name} holds {int(codes.min())} to {int(codes.max())}, and {spec.weight.bits} bits hold "
                         f"{-half} to {half - 1}")
