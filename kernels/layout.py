"""Layout: how a kernel wants a weight's tensors arranged, and the way back to the canonical form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from qpass.scheme import codec_of
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

Packed: TypeAlias = "dict[str, Tensor]"


class NonFinite(ValueError):
    """A weight that was to be finite holds NaN or Inf."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A named arrangement. Invariant: unpack(pack(w, spec), spec) equals w, bit for bit.

    `rows(packed, spec, ids)` gives the rows `ids` [M] of the weight and reads no others; a layout without it cannot
    serve as the table of an embedding. `quantize(weight, spec, into, largest, finite)` packs what quantize_weight of
    qpass/weight.py gives, bit for bit, faster than the two do, in the tensors `into` where they fit and it can; if
    `finite`, it raises NonFinite for a weight with NaN or Inf, when all of `into` is written;
    `largest(weight)` is the largest magnitude in a weight, float32 [], Inf or NaN if it holds one. Both give None for a
    weight that they do not take.

    `even(packed, spec)` is the same weight with tensors whose shapes and dtypes do not depend on its values, as experts
    that share one tensor need; without it `pack` gives such.

    `pack_parts(weights, spec)` is `pack` of one weight whose rows come some at a time, always a multiple of 32 but for
    the last; it holds none of them longer than it takes.

    `bits(spec)` is what a code takes here; without it, what it takes on disk.

    `names(spec)` are the tensors of a packed weight in the order in which ops receive them.
    """

    name: str
    names: Callable[[LinearSpec], tuple[str, ...]]
    pack: Callable[[CanonicalWeight, LinearSpec], Packed]
    unpack: Callable[[Packed, LinearSpec], CanonicalWeight]
    rows: Callable[[Packed, LinearSpec, Tensor], CanonicalWeight] | None = None
    quantize: Callable[[Tensor, LinearSpec, Packed | None, Tensor | None, bool], Packed | None] | None = None
    largest: Callable[[Tensor], Tensor | None] | None = None
    even: Callable[[Packed, LinearSpec], Packed] | None = None
    pack_parts: Callable[[Iterable[CanonicalWeight], LinearSpec], Packed] | None = None
    bits: Callable[[LinearSpec], int] | None = None


def _canonical_names(spec: LinearSpec) -> tuple[str, ...]:
    codec = codec_of(spec.weight)
    if codec is not None:
        return codec.names
    return ("qweight", "scale") if spec.weight.symmetric else ("qweight", "scale", "zero_point")


def _same(weight: CanonicalWeight, spec: LinearSpec) -> Packed:
    return dict(weight.tensors)


def _back(packed: Packed, spec: LinearSpec) -> CanonicalWeight:
    return CanonicalWeight(dict(packed))


def _rows(packed: Packed, spec: LinearSpec, ids: Tensor) -> CanonicalWeight:
    return CanonicalWeight({name: tensor[ids] for name, tensor in packed.items()})


def _bits(spec: LinearSpec) -> int:
    return 8 if spec.weight.type == "int" else spec.weight.bits


CANONICAL = Layout(name="canonical", names=_canonical_names, pack=_same, unpack=_back, rows=_rows, bits=_bits)
"""Integers one a byte, as quantization gives them: what the reference reads."""
