"""x86: the native kernels in the table, one for each family and instruction set, and the layout that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qpass import large_pages
from qpass.dtype import FLOATS, dtype_name
from qpass.integer_scales import factor
from qpass.kernels.cpu import native, native_weights
from qpass.kernels.cpu.x86_encode import integers_known, largest
from qpass.kernels.layout import Layout, NonFinite, Packed
from qpass.kernels.registry import LinearCall, register_kernel
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("w4a8", "w8a8", "w4a16", "w8a16")
ISAS = {"amx": ("amx_int8", 40), "vnni": ("avx512_vnni", 30), "avx2": ("avx2", 20), "plain": ("x86_64", 10)}

_LARGEST_GROUP = (1 << 17) - 1  # times 128 * 128, the largest sum of products that int32 holds
_ROWS_AT_A_TIME = 256
_INTEGER_ROWS = 5  # of 16 bytes a block, before the multipliers of integer scales
_ZERO_POINT, _COLSUM, _BIAS = 1, 2, 4
_BYTES = ("float8_e4m3fn", "float8_e8m0fnu")  # scales that torch cannot fill: padded with bytes of 0


def _names(spec: LinearSpec) -> tuple[str, ...]:
    zero_point = () if spec.weight.symmetric else ("zero_point",)
    colsum = ("colsum",) if spec.activation is not None and not spec.activation.symmetric else ()
    return ("qweight", "scale", *zero_point, *colsum)


def blocked(rows: Tensor, fill: float) -> Tensor:
    """[N, G] -> [Np / 16, G, 16], padded outputs holding `fill`; always a copy."""
    n, groups = rows.shape
    seen, pad = (rows.view(torch.uint8), 0) if dtype_name(rows.dtype) in _BYTES else (rows, fill)
    whole = seen.new_full((native.padded(n, 32), groups), pad)
    whole[:n] = seen
    return whole.view(-1, 16, groups).transpose(1, 2).contiguous().view(rows.dtype)


def unblocked(blocks: Tensor, n: int) -> Tensor:
    """The inverse of `blocked`."""
    seen = blocks.view(torch.uint8) if dtype_name(blocks.dtype) in _BYTES else blocks
    return seen.transpose(1, 2).reshape(-1, blocks.shape[1])[:n].contiguous().view(blocks.dtype)


def _pack(weight: CanonicalWeight, spec: LinearSpec) -> Packed:
    return _pack_parts((weight,), spec)


def _pack_parts(parts: Iterable[CanonicalWeight], spec: LinearSpec) -> Packed:
    qweight = large_pages.empty((native.packed_bytes(*spec.shape, spec.weight.bits),), torch.uint8)
    rows: dict[str, Tensor] = {}  # each made whole at once: pieces would lie between what passes through memory
    start = at = 0
    for weight in parts:
        if weight.scale.dtype not in native.dtype_index():
            raise TypeError("scales must be float32, bfloat16 or float16 to be packed for x86, got "
                            f"{weight.scale.dtype}")
        n, k = weight.qweight.shape
        size = native.packed_bytes(n, k, spec.weight.bits)
        native.pack(weight, spec.weight.bits, into=qweight[start:start + size])
        of_rows = {"scale": weight.scale, "zero_point": weight.zero_point}
        if "colsum" in _names(spec):
            of_rows["colsum"] = _colsum(weight, replace(spec, out_features=n))
        for name, part in of_rows.items():
            if part is None:
                continue
            if name not in rows:
                length = native.padded(spec.out_features, 32) if name == "colsum" else spec.out_features
                rows[name] = part.new_empty((length, *part.shape[1:]))
            rows[name][at:at + len(part)] = part
        start, at = start + size, at + n
        del weight, of_rows, part
    packed = {"qweight": qweight, "scale": _packed_scale(rows["scale"], spec)}
    if "zero_point" in rows:
        packed["zero_point"] = blocked(rows["zero_point"], 0)
    if "colsum" in rows:
        packed["colsum"] = rows["colsum"]
    return packed


def _packed_scale(scale: Tensor, spec: LinearSpec) -> Tensor:
    """[Np / 16, G, 16]; integer scales of a checkpoint from anywhere are found here, and become int8 (product.h).

    Then [Np / 16, G + 5, 16] holds, one after the other, a float32 scale a row, Np bytes of which the first says what
    dtype the scales had, and the multipliers.
    """
    integer = (spec.activation is not None and spec.weight.bits == 4 and spec.weight.symmetric and spec.groups > 1
               and spec.group_size % 32 == 0 and spec.in_features <= _LARGEST_GROUP)
    parts = factor(scale) if integer else None
    if parts is None:
        return blocked(scale, 1)
    multiplier, channel = parts
    channels = blocked(channel[:, None], 1).flatten()
    dtype = torch.zeros(len(channels), dtype=torch.int8)
    dtype[0] = native.dtype_index()[scale.dtype]
    flat = torch.cat((channels.view(torch.int8), dtype, blocked(multiplier, 1).flatten()))
    return flat.view(-1, spec.groups + _INTEGER_ROWS, 16)


def _scale(packed: Packed) -> Tensor:
    """[Np / 16, G, 16] in the dtype that the scales had when they were packed."""
    scale = packed["scale"]
    if scale.dtype != torch.int8:
        return scale
    flat, padded = scale.flatten(), scale.shape[0] * 16
    channel = flat[:padded * 4].view(torch.float32).view(-1, 1, 16)
    multiplier = flat[padded * 5:].view(scale.shape[0], -1, 16)
    dtype = {index: dtype for dtype, index in native.dtype_index().items()}[int(flat[padded * 4])]
    return (multiplier * channel).to(dtype)


def _colsum(weight: CanonicalWeight, spec: LinearSpec) -> Tensor:
    """Sum of each output's weights, float32 [Np]; some rows at a time, for sum() widens all that it reads."""
    whole = torch.zeros(native.padded(spec.out_features, 32))
    for start in range(0, spec.out_features, _ROWS_AT_A_TIME):
        rows = slice(start, min(start + _ROWS_AT_A_TIME, spec.out_features))
        sums = weight.qweight[rows].unflatten(-1, (spec.groups, -1)).sum(-1, dtype=torch.int32).double()
        if weight.zero_point is not None:
            sums -= weight.zero_point[rows].double() * spec.group_size
        whole[rows] = (sums * weight.scale[rows].double()).sum(-1)
    return whole


def _unpack(packed: Packed, spec: LinearSpec) -> CanonicalWeight:
    n, k = spec.out_features, spec.in_features
    tensors = {"qweight": native.unpack(packed["qweight"], n, k, spec.weight.bits),
               "scale": unblocked(_scale(packed), n)}
    if not spec.weight.symmetric:
        tensors["zero_point"] = unblocked(packed["zero_point"], n)
    return CanonicalWeight(tensors)


def _quantize(weight: Tensor, spec: LinearSpec, into: Packed | None = None, largest: Tensor | None = None,
              finite: bool = False) -> Packed | None:
    numbers, weight = spec.weight, weight.detach()
    if not native_weights.takes(weight) or not integers_known(numbers):
        return None
    sums = "colsum" in _names(spec)
    if sums and spec.groups > 1:
        if finite and not native_weights.largest(weight).isfinite():
            raise NonFinite("the weight holds NaN or Inf")
        return _pack(native_weights.quantize_weight(weight, spec.group_size, numbers.bits, symmetric=numbers.symmetric),
                     spec)
    return native_weights.quantize_pack(weight, spec.group_size, numbers.bits, symmetric=numbers.symmetric, colsum=sums,
                                        into=into, finite=finite)


def _rows_of(packed: Packed, spec: LinearSpec, ids: Tensor) -> CanonicalWeight:
    """The rows `ids` alone, in plain torch: of each block (csrc/product.h) the 4 bytes a line that are a row's."""
    block, row = ids // 16, ids % 16
    lines = 2 * spec.weight.bits
    blocks = packed["qweight"].view(-1, native.padded(spec.in_features, 64) // 64, lines, 16, 4)
    codes = blocks[block, :, :, row]
    if spec.weight.bits == 4:  # low nibbles are the first 32 inputs of a block, high nibbles the others
        codes = torch.cat((codes & 15, codes >> 4), dim=2)
    q = (codes.to(torch.int16) - (1 << spec.weight.bits - 1)).to(torch.int8).flatten(1)
    tensors = {"qweight": q[:, :spec.in_features], "scale": _scale(packed)[block, :, row]}
    if not spec.weight.symmetric:
        tensors["zero_point"] = packed["zero_point"][block, :, row]
    return CanonicalWeight({name: tensor.contiguous() for name, tensor in tensors.items()})


def _even(packed: Packed, spec: LinearSpec) -> Packed:
    return {**packed, "scale": _scale(packed)}


X86_TILE64 = Layout(name="x86_tile64", names=_names, pack=_pack, unpack=_unpack, rows=_rows_of, quantize=_quantize,
                    largest=largest, even=_even, pack_parts=_pack_parts,
                    bits=lambda spec: 4 if spec.weight.bits <= 4 else 8)
"""Tiles of 16 outputs x 64 inputs, 4 or 8 bits a weight, which every x86 instruction set reads (csrc/product.h)."""


def _refuses(call: LinearCall) -> str | None:
    spec = call.spec
    if spec.weight.type != "int":
        return f"computes integer weights, not {spec.weight.type}"
    if call.dtype_name not in FLOATS:
        return f"takes float32, bfloat16 or float16 activations, not {call.dtype_name}"
    if spec.groups > 1 and spec.group_size % 32 != 0:
        return f"needs group_size % 32 == 0, got {spec.group_size}"
    if spec.group_size > _LARGEST_GROUP:
        return f"needs at most {_LARGEST_GROUP} inputs in a group, got {spec.group_size}"
    return native.refuses()


def _activation(spec: LinearSpec) -> int:
    return 0 if spec.activation is None else 1 if spec.activation.symmetric else 2


def _one(packed: Sequence[Any], spec: LinearSpec) -> tuple[Any, Any, Any, Any]:
    """qweight, scale, zero_point or None, colsum or None."""
    named = dict(zip(_names(spec), packed, strict=True))
    return named["qweight"], named["scale"], named.get("zero_point"), named.get("colsum")


def _several(packed: Sequence[Any], bias: Sequence[Any], specs: Sequence[LinearSpec]
             ) -> tuple[list[Any], list[int], list[int]] | None:
    """`tensors`, `n` and `has` of the list forms; None if the weights differ in what one call must share."""
    if len({(s.in_features, s.weight.bits, _activation(s)) for s in specs}) != 1:
        return None
    tensors: list[Any] = []
    has, start = [], 0
    for spec, b in zip(specs, bias, strict=True):
        names = _names(spec)
        tensors += packed[start:start + len(names)]
        start += len(names)
        tensors += [] if b is None else [b]
        has.append(_ZERO_POINT * ("zero_point" in names) + _COLSUM * ("colsum" in names) + _BIAS * (b is not None))
    return tensors, [s.out_features for s in specs], has


def _native_call(index: int) -> Callable[[str, Sequence[Any]], tuple[Callable[..., Any], tuple[Any, ...]] | None]:
    """Arguments of a `qpass` op to those of the `qpass_x86` op that runs on instruction set `index`."""

    def call(op: str, args: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        native.library()
        quantized = op.startswith("linear_q")
        x, rest = tuple(args[:3 if quantized else 1]), args[3 if quantized else 1:]
        packed, bias, which = rest[0], rest[1], rest[2]
        target = native.op(op)
        if not op.endswith("_list"):
            spec = LinearSpec.parse(which)
            last = rest[3] if quantized else _activation(spec)
            return target, (*x, *_one(packed, spec), bias, spec.out_features, spec.in_features, spec.weight.bits,
                            last, index)
        specs = [LinearSpec.parse(text) for text in which]
        parts = _several(packed, bias, specs)
        if parts is None:
            return None
        last = rest[3] if quantized else _activation(specs[0])
        return target, (*x, *parts, specs[0].in_features, specs[0].weight.bits, last, index)

    return call


def _register(family: str, short: str) -> None:
    isa, priority = ISAS[short]
    index = native.ISA_INDEX[isa]

    @register_kernel(name=f"linear_{family}_{short}", scheme=family, device="cpu", isa=isa, layout=X86_TILE64,
                     refuses=_refuses, priority=priority, prepare=native.prepare, native_call=_native_call(index))
    def linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        return native.op("linear")(x, *_one(packed, spec), bias, spec.out_features, spec.in_features,  # type: ignore[no-any-return]
                                   spec.weight.bits, _activation(spec), index)

    @linear.form("linear_list")
    def linear_list(x: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None], specs: Sequence[LinearSpec]
                    ) -> list[Tensor]:
        parts = _several(packed, bias, specs)
        if parts is None:
            raise ValueError(f"weights of one list must share inputs, bits and activation, got {list(map(str, specs))}")
        y = native.op("linear_list")(x, *parts, specs[0].in_features, specs[0].weight.bits, _activation(specs[0]),
                                     index)
        return list(y.split(parts[1], -1))

    if not family.endswith("a8"):
        return

    @linear.form("linear_q")
    def linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                 bias: Tensor | None, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        return native.op("linear_q")(xq, x_scale, x_zero_point, *_one(packed, spec), bias,  # type: ignore[no-any-return]
                                     spec.out_features, spec.in_features, spec.weight.bits, dtype, index)

    @linear.form("linear_q_list")
    def linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                      bias: Sequence[Tensor | None], specs: Sequence[LinearSpec], dtype: torch.dtype) -> list[Tensor]:
        parts = _several(packed, bias, specs)
        if parts is None:
            raise ValueError(f"weights of one list must share inputs, bits and activation, got {list(map(str, specs))}")
        y = native.op("linear_q_list")(xq, x_scale, x_zero_point, *parts, specs[0].in_features, specs[0].weight.bits,
                                       dtype, index)
        return list(y.split(parts[1], -1))


for _family in FAMILIES:
    for _short in ISAS:
        _register(_family, _short)
