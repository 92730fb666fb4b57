"""x86 decoded: kernels for weights that are no plain integers in the table, and the layout that they share.

The weight is decoded to float32 on its way into the product (csrc/decoded.h), the activation stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from qpass.dtype import FLOATS, dtype_name
from qpass.kernels.cpu import native, x86_encode
from qpass.kernels.cpu.x86 import blocked, unblocked
from qpass.kernels.cpu.x86_codes import FAMILIES, Parts, coding_of
from qpass.kernels.layout import Layout, Packed
from qpass.kernels.registry import LinearCall, register_kernel
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

ISAS = {"amx": ("amx_int8", 25), "avx2": ("avx2", 15), "plain": ("x86_64", 5)}
_KIND = {"": 0, "offset": 1, "zero": 2, "zero_point": 2}
_TABLE, _GAIN, _BIAS = 4, 8, 16
_SCALES = (*FLOATS, "uint8", "float8_e8m0fnu", "float8_e4m3fn")


def _names(spec: LinearSpec) -> tuple[str, ...]:
    return coding_of(spec).names()


def _pack(weight: CanonicalWeight, spec: LinearSpec) -> Packed:
    coding = coding_of(spec)
    parts = coding.take(weight.tensors, spec)
    if dtype_name(parts.scale.dtype) not in _SCALES:
        raise TypeError(f"scales must be float32, bfloat16, float16, e8m0 or e4m3, got {parts.scale.dtype}")
    packed = {"qweight": _pack_codes(parts), "scale": blocked(parts.scale, 1)}
    if parts.third is not None:
        packed[coding.third] = blocked(parts.third, 0)
    if coding.table and parts.table is not None:
        packed["table"] = parts.table.clone()
    if coding.gain and parts.gain is not None:
        packed["gain"] = torch.nn.functional.pad(parts.gain, (0, -spec.out_features % 32), value=1.0)
    if coding.kept and parts.kept is not None:
        packed[coding.kept] = parts.kept
    return packed


def _pack_codes(parts: Parts) -> Tensor:
    if parts.table is not None:
        return native.pack(CanonicalWeight({"qweight": parts.codes}), 4, "decoded")
    flipped = parts.codes.view(torch.uint8) ^ 128  # packing adds 128 to a byte, and these stay as they are
    return native.pack(CanonicalWeight({"qweight": flipped.view(torch.int8)}), 8, "decoded").view(parts.dtype)


def _bits(spec: LinearSpec) -> int:
    return 4 if coding_of(spec).table else 8


def _unpack(packed: Packed, spec: LinearSpec) -> CanonicalWeight:
    coding, (n, k) = coding_of(spec), spec.shape
    q = packed["qweight"]
    if coding.table:
        codes = native.unpack(q, n, k, 4, "decoded")
    else:
        codes = (native.unpack(q.view(torch.uint8), n, k, 8, "decoded").view(torch.uint8) ^ 128).view(torch.int8)
    parts = Parts(codes=codes, scale=unblocked(packed["scale"], n), dtype=q.dtype, table=packed.get("table"),
                  third=unblocked(packed[coding.third], n) if coding.third else None, gain=packed.get("gain"),
                  kept=packed.get(coding.kept))
    return CanonicalWeight(coding.give(parts, spec))


X86_DECODED = Layout(name="x86_decoded", names=_names, pack=_pack, unpack=_unpack, quantize=x86_encode.quantize,
                     largest=partial(x86_encode.largest, part="decoded"), bits=_bits)
"""Tiles of 16 outputs x 64 inputs as in x86_tile64, with the scales, offsets and tables of csrc/decoded.h."""


def refuses(call: LinearCall) -> str | None:
    """Why csrc/decoded.h does not multiply with this weight, or None."""
    spec = call.spec
    if call.dtype_name not in FLOATS:
        return f"takes float32, bfloat16 or float16 activations, not {call.dtype_name}"
    if spec.groups > 1 and spec.group_size % 16 != 0:
        return f"needs group_size % 16 == 0, got {spec.group_size}"
    if spec.weight.type in ("nf4", "fp4") and spec.in_features % spec.group_size != 0:
        return f"needs blocks of {spec.group_size} that do not cross rows of {spec.in_features}"
    return native.refuses("decoded")


def _tensors(packed: Sequence[Any], bias: Any, spec: LinearSpec) -> tuple[list[Any], int]:
    """What the op takes of a packed weight and its bias, and what `has` says of it."""
    coding = coding_of(spec)
    taken = [t for name, t in zip(coding.names(), packed, strict=True) if name != coding.kept]
    has = _KIND[coding.third] + _TABLE * coding.table + _GAIN * coding.gain + _BIAS * (bias is not None)
    return taken if bias is None else [*taken, bias], has


def arguments(packed: Sequence[Any], bias: Any, spec: LinearSpec) -> tuple[Any, ...]:
    """What the op takes between x and the number of the instruction set."""
    tensors, has = _tensors(packed, bias, spec)
    return tensors, spec.out_features, has, spec.in_features, spec.group_size


def _list_arguments(packed: Sequence[Any], bias: Sequence[Any], specs: Sequence[LinearSpec]) -> tuple[Any, ...]:
    all_tensors: list[Any] = []
    counts, has_all, start = [], [], 0
    for spec, b in zip(specs, bias, strict=True):
        names = _names(spec)
        tensors, has = _tensors(packed[start:start + len(names)], b, spec)
        start += len(names)
        all_tensors += tensors
        counts.append(len(tensors))
        has_all.append(has)
    return (all_tensors, counts, [s.out_features for s in specs], has_all, specs[0].in_features,
            [s.group_size for s in specs])


def _native_call(index: int) -> Callable[[str, Sequence[Any]], tuple[Callable[..., Any], tuple[Any, ...]] | None]:
    def call(op: str, args: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        native.library("decoded")
        x, packed, bias, which = args[:4]
        if op == "linear":
            return native.op("decoded"), (x, *arguments(packed, bias, LinearSpec.parse(which)), index)
        if op == "linear_list":
            specs = [LinearSpec.parse(text) for text in which]
            return native.op("decoded_list"), (x, *_list_arguments(packed, bias, specs), index)
        return None

    return call


def _register(short: str) -> None:
    isa, priority = ISAS[short]
    index = native.ISA_INDEX[isa]

    @register_kernel(name=f"linear_decode_{short}", scheme=FAMILIES, device="cpu", isa=isa, layout=X86_DECODED,
                     refuses=refuses, priority=priority, prepare=partial(native.prepare, "decoded"),
                     native_call=_native_call(index))
    def linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        return native.op("decoded")(x, *arguments(packed, bias, spec), index)  # type: ignore[no-any-return]

    @linear.form("linear_list")
    def linear_list(x: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None], specs: Sequence[LinearSpec]
                    ) -> list[Tensor]:
        y = native.op("decoded_list")(x, *_list_arguments(packed, bias, specs), index)
        return list(y.split([s.out_features for s in specs], -1))


for _short in ISAS:
    _register(_short)
