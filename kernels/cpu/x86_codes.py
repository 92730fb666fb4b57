"""x86 codes: a weight in any number format in, the codes, scales and tables that csrc/decoded.h multiplies with out.

One `Coding` a format: `take` gives the parts from the canonical tensors, `give` the canonical tensors from the parts,
bit for bit. Codes are int8 [N, K]: those of a table less 8, floats of 8 bits as their bytes, integers as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch

from qpass.codecs.elements import (
    E2M1,
    E2M3,
    E3M2,
    pack_nibbles,
    pack_sixes,
    unpack_nibbles,
    unpack_sixes,
    values,
)
from qpass.codecs.fp8 import scale_shape
from qpass.codecs.int8_absmax import PART
from qpass.formats.bits import pack_rows, unpack_rows
from qpass.spec import LinearSpec

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What csrc/decoded.h calls by these names, unpadded: scale and third [N, G], table [16], gain [N].

    `codes` are packed in 4 bits if there is a table; else `dtype` is what a byte of them holds. `third` is an offset,
    a zero or a zero point, as the coding says. `kept` are canonical tensors that the product does not read as they are.
    """

    codes: Tensor
    scale: Tensor
    third: Tensor | None = None
    table: Tensor | None = None
    gain: Tensor | None = None
    kept: Tensor | None = None
    dtype: torch.dtype = field(default_factory=lambda: torch.int8)


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How one type of weight becomes Parts. `third` is "offset", "zero", "zero_point" or "" for none."""

    take: Callable[[Tensors, LinearSpec], Parts]
    give: Callable[[Parts, LinearSpec], Tensors]
    third: str = ""
    table: bool = False
    gain: bool = False
    kept: str = ""

    def names(self) -> tuple[str, ...]:
        """The packed tensors in order; those before `kept` are what the op takes."""
        optional = (self.third, "table" if self.table else "", "gain" if self.gain else "", self.kept)
        return ("qweight", "scale", *(name for name in optional if name))


def _nan_rows(codes: Tensor) -> Tensor:
    """float32 [N]: NaN for rows of e4m3 codes among which is a NaN, which makes every sum of the row NaN; else 1."""
    if codes.dtype != torch.float8_e4m3fn:
        return torch.ones(codes.shape[0])
    nan = ((codes.view(torch.uint8) & 127) == 127).flatten(1).any(1)
    return torch.where(nan, float("nan"), 1.0)


def _expanded(scale: Tensor, spec: LinearSpec) -> Tensor:
    """Scales of a tensor, a row, groups or blocks -> [N, G]."""
    n = spec.out_features
    seen = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    if spec.weight.granularity == "per_tensor":
        seen = seen.view(1, 1).expand(n, 1)
    elif spec.weight.granularity == "per_block":
        seen = seen.repeat_interleave(spec.group_size, 0)[:n]
    return seen.reshape(n, spec.groups).view(scale.dtype)


def _take_fp8(tensors: Tensors, spec: LinearSpec) -> Parts:
    codes = tensors["weight"]
    return Parts(codes=codes.view(torch.int8), scale=_expanded(tensors["scale"], spec), gain=_nan_rows(codes),
                 dtype=codes.dtype)


def _give_fp8(parts: Parts, spec: LinearSpec) -> Tensors:
    rows = parts.scale
    if spec.weight.granularity == "per_tensor":
        rows = rows[:1]
    elif spec.weight.granularity == "per_block":
        rows = rows[::spec.group_size]
    scale = rows.contiguous().view(scale_shape(spec.weight, spec.shape))
    return {"weight": parts.codes.view(parts.dtype), "scale": scale}


def _give_mxfp8(parts: Parts, spec: LinearSpec) -> Tensors:
    return {"weight": parts.codes.view(parts.dtype), "scale": parts.scale}


def _nibbles(codes: Tensor) -> Tensor:
    return codes.to(torch.int8) - 8


def _fours(codes: Tensor) -> Tensor:
    return (codes + 8).to(torch.uint8)


def _take_e2m1(tensors: Tensors, spec: LinearSpec) -> Parts:
    return Parts(codes=_nibbles(unpack_nibbles(tensors["packed"])), scale=tensors["scale"], table=values(E2M1, "cpu"))


def _give_e2m1(parts: Parts, spec: LinearSpec) -> Tensors:
    return {"packed": pack_nibbles(_fours(parts.codes)), "scale": parts.scale}


def _nvfp4(kept: str) -> Coding:
    def take(tensors: Tensors, spec: LinearSpec) -> Parts:
        whole = tensors[kept].float()
        gain = (whole if kept == "scale_2" else 1 / whole).expand(spec.out_features) * _nan_rows(tensors["scale"])
        return replace(_take_e2m1(tensors, spec), gain=gain, kept=tensors[kept])

    def give(parts: Parts, spec: LinearSpec) -> Tensors:
        assert parts.kept is not None
        return {**_give_e2m1(parts, spec), kept: parts.kept}

    return Coding(take=take, give=give, table=True, gain=True, kept=kept)


@lru_cache(maxsize=2)
def _sixes(kind: str) -> tuple[Tensor, Tensor]:
    """The e4m3 byte of each code of 6 bits, all of which e4m3 holds exactly, and the way back."""
    bytes_ = values(E3M2 if kind == "mxfp6_e3m2" else E2M3, "cpu").to(torch.float8_e4m3fn).view(torch.int8)
    back = torch.zeros(256, dtype=torch.uint8)
    back[bytes_.view(torch.uint8).long()] = torch.arange(64, dtype=torch.uint8)
    return bytes_, back


def _take_sixes(tensors: Tensors, spec: LinearSpec) -> Parts:
    codes = _sixes(spec.weight.type)[0][unpack_sixes(tensors["packed"]).int()]
    return Parts(codes=codes, scale=tensors["scale"], dtype=torch.float8_e4m3fn)


def _give_sixes(parts: Parts, spec: LinearSpec) -> Tensors:
    codes = _sixes(spec.weight.type)[1][parts.codes.view(torch.uint8).int()]
    return {"packed": pack_sixes(codes), "scale": parts.scale}


def _take_codebook(tensors: Tensors, spec: LinearSpec) -> Parts:
    packed = tensors["packed"]
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[:spec.out_features * spec.in_features]
    return Parts(codes=_nibbles(codes.view(spec.shape)), scale=tensors["absmax"].view(spec.out_features, spec.groups),
                 table=tensors["code"])


def _give_codebook(parts: Parts, spec: LinearSpec) -> Tensors:
    assert parts.table is not None
    codes = torch.nn.functional.pad(_fours(parts.codes).flatten(), (0, parts.codes.numel() % 2))
    return {"packed": codes[0::2] << 4 | codes[1::2], "absmax": parts.scale.flatten(), "code": parts.table}


def _take_absmax(tensors: Tensors, spec: LinearSpec) -> Parts:
    return Parts(codes=tensors["weight"], scale=tensors["absmax"][:, None], gain=torch.full((spec.out_features,), PART))


def _give_absmax(parts: Parts, spec: LinearSpec) -> Tensors:
    return {"weight": parts.codes, "absmax": parts.scale.flatten()}


def _affine(third: str, *, table: bool, signed: bool) -> Coding:
    # Unsigned codes stay so: a group of equal weights has the code 0 and any scale, and is exact only as 0 * scale.
    def take(tensors: Tensors, spec: LinearSpec) -> Parts:
        codes, lowest = unpack_rows(tensors["packed"], spec.weight.bits, spec.in_features), 1 << spec.weight.bits - 1
        if table:
            first = -8 if signed else 0
            values_ = torch.arange(first, first + 16, dtype=torch.float32)
            moved = codes if signed else codes + (lowest - 8)
            return Parts(codes=moved, scale=tensors["scale"], third=tensors[third], table=values_)
        dtype = torch.int8 if signed else torch.uint8
        moved = codes if signed else (codes.view(torch.uint8) + lowest).view(torch.int8)
        return Parts(codes=moved, scale=tensors["scale"], third=tensors[third], dtype=dtype)

    def give(parts: Parts, spec: LinearSpec) -> Tensors:
        assert parts.third is not None
        codes, lowest = parts.codes, 1 << spec.weight.bits - 1
        if not signed:
            codes = codes - (lowest - 8) if table else (codes.view(torch.uint8) - lowest).view(torch.int8)
        return {"packed": pack_rows(codes, spec.weight.bits), "scale": parts.scale, third: parts.third}

    return Coding(take=take, give=give, third=third, table=table)


def _integers(third: str, *, table: bool) -> Coding:
    def take(tensors: Tensors, spec: LinearSpec) -> Parts:
        return Parts(codes=tensors["qweight"], scale=tensors["scale"], third=tensors.get(third),
                     table=torch.arange(-8, 8, dtype=torch.float32) if table else None)

    def give(parts: Parts, spec: LinearSpec) -> Tensors:
        return {"qweight": parts.codes, "scale": parts.scale} | ({} if parts.third is None else {third: parts.third})

    return Coding(take=take, give=give, third=third, table=table)


_CODINGS = {
    "fp8": Coding(take=_take_fp8, give=_give_fp8, gain=True),
    "mxfp8": Coding(take=_take_fp8, give=_give_mxfp8, gain=True),
    "mxfp4": Coding(take=_take_e2m1, give=_give_e2m1, table=True),
    "mxfp6_e3m2": Coding(take=_take_sixes, give=_give_sixes), "mxfp6_e2m3": Coding(take=_take_sixes, give=_give_sixes),
    "nvfp4": _nvfp4("global_scale"), "nvfp4_reciprocal": _nvfp4("global_scale"), "nvfp4_mul": _nvfp4("scale_2"),
    "nf4": Coding(take=_take_codebook, give=_give_codebook, table=True),
    "fp4": Coding(take=_take_codebook, give=_give_codebook, table=True),
    "int8_absmax": Coding(take=_take_absmax, give=_give_absmax, gain=True),
}
_OFFSETS = {"affine": "offset", "affine_signed": "offset", "affine_zero": "zero"}
_BITS = {"fp8": 8, "mxfp8": 8, "int8_absmax": 8, "mxfp6_e3m2": 6, "mxfp6_e2m3": 6}

FAMILIES = (*(f"{kind}_w{_BITS.get(kind, 4)}a16" for kind in _CODINGS),
            *(f"{kind}_w{bits}a16" for kind in _OFFSETS for bits in range(1, 9)),
            *(f"w{bits}a16" for bits in range(2, 9)))
"""The families that have a coding."""


def coding_of(spec: LinearSpec) -> Coding:
    """How this weight is coded; its family is one of FAMILIES."""
    kind, table = spec.weight.type, spec.weight.bits <= 4
    if kind == "int":
        return _integers("" if spec.weight.symmetric else "zero_point", table=table)
    if kind in _OFFSETS:
        return _affine(_OFFSETS[kind], table=table, signed=kind == "affine_signed")
    return _CODINGS[kind]
