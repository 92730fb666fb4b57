"""x86 encode: a float weight in; the packed tensors of x86_decoded out, in one native pass instead of by its codec.

Of the types that are made here, bit for bit what the codec and the layout give. `None` is for those that are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qpass.codecs.codebook import FP4, NF4
from qpass.codecs.elements import E2M1, values
from qpass.codecs.fp8 import LARGEST, stored_scale
from qpass.codecs.nvfp4 import global_scale_of
from qpass.kernels.cpu import native, native_weights
from qpass.kernels.cpu.native_weights import Element
from qpass.kernels.layout import Packed
from qpass.scheme import WeightArgs
from qpass.spec import LinearSpec

if TYPE_CHECKING:
    from torch import Tensor

_EXPONENT: dict[str, Element] = {"mxfp4": "e2m1", "mxfp8": "e4m3", "mxfp6_e2m3": "e2m3"}
_BOOKS = {"nf4": NF4, "fp4": FP4}


def largest(weight: Tensor, part: str = "products") -> Tensor | None:
    """The largest magnitude of a weight, float32 [], Inf or NaN if it holds one; None for one that is not taken. `part`
    of the library is one that is needed anyway."""
    return native_weights.largest(weight, part) if _taken(weight, part) else None


def quantize(weight: Tensor, spec: LinearSpec, into: Packed | None = None, largest: Tensor | None = None,
             finite: bool = False) -> Packed | None:
    """`weight` [N, K] as the layout x86_decoded packs it, in the tensors of `into` where they fit; or None.

    `largest` is the largest magnitude of this weight and of all that share a scale for the tensor with it, if it is
    known already. If `finite`, raises NonFinite for NaN and Inf.
    """
    numbers, weight = spec.weight, weight.detach()
    if not _taken(weight, "products" if numbers.type == "int" else "decoded"):
        return None
    if numbers.type == "int":
        return _integers(weight, spec, into, finite)
    whole = spec.in_features % spec.group_size == 0
    if numbers.type in _EXPONENT and whole:
        made = native_weights.encode_pack(weight, spec.group_size, _EXPONENT[numbers.type], "exponent", into=into,
                                          finite=finite)
        table = {"table": values(E2M1, "cpu")} if numbers.type == "mxfp4" else {}
        return {**made, **table, **(_ones(spec) if numbers.type == "mxfp8" else {})}
    if numbers.type == "nvfp4" and whole:
        shared = global_scale_of(_amax(weight) if largest is None else largest)
        made = native_weights.encode_pack(weight, spec.group_size, "e2m1", "nested", shared, into=into,
                                          finite=finite)
        gain = _ones(spec)["gain"]
        gain[:spec.out_features] = 1 / shared
        return {**made, "table": values(E2M1, "cpu"), "gain": gain, "global_scale": shared}
    if numbers.type in _BOOKS and whole:
        code = torch.tensor(_BOOKS[numbers.type])
        made = native_weights.encode_pack(weight, spec.group_size, "codebook", "absmax", _bounds(code), into=into,
                                          finite=finite)
        return {**made, "table": code}
    if numbers.type == "fp8":
        return {**_fp8(weight, spec, into, largest, finite), **_ones(spec)}
    return None


def integers_known(numbers: WeightArgs) -> bool:
    """Whether native code rounds to these integers. Whatever else a scheme may say of its weights one day, such as how
    scales are chosen, is for plain torch to do."""
    known = WeightArgs(bits=numbers.bits, granularity=numbers.granularity, group_size=numbers.group_size,
                       symmetric=numbers.symmetric)
    return numbers == known and numbers.granularity != "per_tensor"


def _taken(weight: Tensor, part: str) -> bool:
    return native_weights.takes(weight) and native.prepare(part) is None


def _integers(weight: Tensor, spec: LinearSpec, into: Packed | None, finite: bool) -> Packed | None:
    if not integers_known(spec.weight):
        return None
    made = native_weights.quantize_pack(weight, spec.group_size, spec.weight.bits, symmetric=spec.weight.symmetric,
                                        decoded=True, into=into, finite=finite)
    return {**made, **({"table": torch.arange(-8, 8, dtype=torch.float32)} if spec.weight.bits <= 4 else {})}


def _ones(spec: LinearSpec) -> Packed:
    return {"gain": torch.ones(native.padded(spec.out_features, 32))}


def _bounds(code: Tensor) -> Tensor:
    """The middles between the values of a codebook in order, and the codes in order: what bucketize would search."""
    order = torch.argsort(code, stable=True)
    ordered = code[order]
    return torch.cat(((ordered[1:] + ordered[:-1]) / 2, order.float()))


def _amax(weight: Tensor) -> Tensor:
    found = native_weights.largest(weight, "decoded")
    return found if found.isfinite() else native_weights.amax(weight, weight.shape[1]).amax()


def _fp8(weight: Tensor, spec: LinearSpec, into: Packed | None, largest: Tensor | None, finite: bool) -> Packed:
    n, granularity = spec.out_features, spec.weight.granularity
    if granularity == "per_tensor":
        scale = stored_scale((_amax(weight) if largest is None else largest) / LARGEST, weight.dtype).expand(n)
    elif granularity == "per_block" and spec.group_size % 16 == 0 and spec.group_size <= spec.in_features:
        return native_weights.encode_pack(weight, spec.group_size, "e4m3", "block", into=into, finite=finite)
    elif granularity == "per_block":
        side = spec.group_size
        most = torch.nn.functional.pad(native_weights.amax(weight, side), (0, 0, 0, -n % side))
        most = most.unflatten(0, (-1, side)).amax(1)
        scale = stored_scale(most / LARGEST, weight.dtype).repeat_interleave(side, 0)[:n]
    else:
        return native_weights.encode_pack(weight, spec.group_size, "e4m3", "amax", into=into, finite=finite)
    return native_weights.encode_pack(weight, spec.group_size, "e4m3", "given", scale, into=into, finite=finite)
