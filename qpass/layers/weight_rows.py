"""Weight rows: several canonical weights of one input in; one whose rows they are, or one cut into several, out.

No number changes: what is shared between the rows of a part (one scale for a tensor, square blocks) is given to each
row first where the whole cannot share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qpass.errors import WeightError
from qpass.scheme import RowCodec, codec_of, family_of
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight


class NotShared(WeightError):
    """Parts that were taken to share a scale or a symmetry do not; `rows_spec(..., shared=False)` holds them."""


def rows_spec(specs: Sequence[LinearSpec], *, shared: bool = True, taken: bool = False) -> LinearSpec:
    """The spec of weights [N_i, K] below each other. Raises ValueError if no one weight can hold them.

    shared  count on what the parts say alone: symmetric if they say so, one scale for all if each has one; whether
            that holds is seen when the numbers are there
    taken   rows will be taken in another order, so that nothing may be shared between neighbours either
    """
    first = specs[0]
    if any(spec.weight != first.weight or spec.activation != first.activation for spec in specs):
        raise ValueError(f"weights of {first.family} and other numbers cannot be one")
    args, alone = first.weight, len(specs) == 1 and not taken
    if args.type == "int":
        if args.granularity == "per_tensor" and not alone:
            args = replace(args, granularity="per_channel")
        args = args if shared else replace(args, symmetric=False, scales="amax")
    elif not alone:
        codec = codec_of(args)
        if not isinstance(codec, RowCodec):
            raise ValueError(f"only its own codec knows the rows of {args.type} weights")
        if not _stays(codec, specs, shared, taken):
            args = codec.by_rows(args, first.shape)
    return replace(first, weight=args, out_features=sum(spec.out_features for spec in specs),
                   family=family_of(args, first.activation))


def put_rows(parts: Sequence[CanonicalWeight], specs: Sequence[LinearSpec], whole: LinearSpec,
             order: Tensor | None = None) -> CanonicalWeight:
    """The weight of `whole`, which is rows_spec(specs); `order` int [N] says which row comes where.

    Raises NotShared if the parts are not what shared=True counted on.
    """
    if whole.weight.type == "int":
        made = _integers(parts, whole)
    else:
        codec = codec_of(whole.weight)
        assert isinstance(codec, RowCodec)
        each = [part.tensors if spec.weight == whole.weight else codec_rows(part.tensors, spec)
                for part, spec in zip(parts, specs, strict=True)]
        made = {name: _below([tensors[name] for tensors in each], size, whole)
                for name, (_, size) in codec.stored(whole.weight, whole.shape).items()}
    if order is not None:
        made = {name: tensor[order] if tensor.shape[0] == whole.out_features else tensor
                for name, tensor in made.items()}
    return CanonicalWeight(made)


def cut_spec(whole: LinearSpec, parts: int) -> LinearSpec | None:
    """The spec of each of `parts` weights of equal rows that stand below each other in `whole`, so that rows_spec gives
    `whole` back; None if its rows share what cannot be cut."""
    if whole.out_features % parts:
        return None
    part = replace(whole, out_features=whole.out_features // parts)
    codec = codec_of(whole.weight)
    if codec is None or parts == 1:
        return part
    return part if isinstance(codec, RowCodec) and _stays(codec, [part] * parts, True, False) else None


def cut_rows(weight: CanonicalWeight, part: LinearSpec, parts: int) -> list[CanonicalWeight]:
    """The inverse of put_rows, for `part` of cut_spec: what all rows share, each part gets."""
    codec = codec_of(part.weight)
    if isinstance(codec, RowCodec) and parts > 1:
        sizes = codec.stored(part.weight, part.shape)
        whole = codec.stored(part.weight, (parts * part.out_features, part.in_features))
        shared = {name for name, (_, size) in sizes.items() if size == whole[name][1]}
    else:
        shared = set()
    pieces = {name: (tensor,) * parts if name in shared else tensor.chunk(parts)
              for name, tensor in weight.tensors.items()}
    return [CanonicalWeight({name: each[at] for name, each in pieces.items()}) for at in range(parts)]


def codec_rows(tensors: dict[str, Tensor], spec: LinearSpec) -> dict[str, Tensor]:
    """The tensors of a codec's weight with nothing shared between rows."""
    codec = codec_of(spec.weight)
    assert isinstance(codec, RowCodec)
    return codec.rows_apart(tensors, spec.weight, spec.shape)


def _stays(codec: RowCodec, specs: Sequence[LinearSpec], shared: bool, taken: bool) -> bool:
    """Whether the parts' numbers serve the whole: each tensor stands below the next part's, or is one for all."""
    args, rows = specs[0].weight, sum(spec.out_features for spec in specs)
    unit = codec.unit(args, specs[0].shape)
    if unit == 0 or (taken and unit > 1) or any(spec.out_features % unit for spec in specs[:-1]):
        return False
    sizes = [{name: size for name, (_, size) in codec.stored(args, spec.shape).items()} for spec in specs]
    for name, (_, size) in codec.stored(args, (rows, specs[0].in_features)).items():
        below = size[0] == (rows if taken else sum(part[name][0] for part in sizes))
        if not below and not (shared and all(part[name] == size for part in sizes)):
            return False
    return True


def _below(parts: list[Tensor], size: tuple[int, ...], whole: LinearSpec) -> Tensor:
    if sum(part.shape[0] for part in parts) == size[0]:
        return torch.cat(parts)
    if any(not torch.equal(part, parts[0]) for part in parts):
        raise NotShared(f"the parts of {whole} have scales of their own")
    return parts[0]


def _integers(parts: Sequence[CanonicalWeight], whole: LinearSpec) -> dict[str, Tensor]:
    zero_points = [part.zero_point for part in parts]
    if whole.weight.symmetric and any(zero is not None for zero in zero_points):
        raise NotShared(f"the weights of {whole} have zero points")
    made = {name: torch.cat([part.tensors[name] for part in parts]) for name in ("qweight", "scale")}
    if not whole.weight.symmetric:
        made["zero_point"] = torch.cat([torch.zeros_like(part.scale, dtype=torch.int8) if zero is None else zero
                                        for part, zero in zip(parts, zero_points, strict=True)])
    return made
