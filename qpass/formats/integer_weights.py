"""Integer weights: what a config says of bits, groups and symmetry in, a checked spec out; and columns in file order.

Used by the formats that store unsigned codes in int32 words (GPTQ, AWQ, AutoRound).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qpass.errors import CheckpointError, RecipeError
from qpass.formats.bits import pack_rows
from qpass.formats.checkpoint import Checkpoint
from qpass.scheme import ActivationArgs, Scheme, WeightArgs
from qpass.spec import LinearSpec

if TYPE_CHECKING:
    from torch import Tensor


def integer_spec(bits: Any, group_size: Any, symmetric: Any, shape: tuple[int, ...], where: str,
                 activation: ActivationArgs | None = None, *, uneven: bool = False) -> LinearSpec:
    """The spec of a weight [N, K]; group_size -1, None or 0 < K < group_size means one group a row.

    `uneven` allows a group size that does not divide K: the weight's type is int_columns then.

    Raises CheckpointError, beginning with `where`, for numbers that no such weight has.
    """
    n, k = shape
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        if group_size not in (-1, None):
            raise CheckpointError(f"{where}: group_size is {group_size!r}; it must be -1 or positive")
        group_size = None
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise CheckpointError(f"{where}: bits is {bits!r}; 2 to 8 are read")
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{where}: whether it is symmetric is said as {symmetric!r}; it must be true or false")
    if group_size is not None and group_size > k:
        group_size = None
    odd = group_size is not None and k % group_size != 0
    if odd and not uneven:
        raise CheckpointError(f"{where}: group size {group_size} does not divide its {k} input features")
    try:
        weight = WeightArgs(bits=bits, symmetric=symmetric, group_size=group_size, type="int_columns" if odd else "int",
                            granularity="per_channel" if group_size is None else "per_group")
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}") from error
    family = Scheme(name="", weight=weight, activation=activation).family
    return LinearSpec(family=family, weight=weight, activation=activation, out_features=n, in_features=k)


def stored_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape of a tensor that is there, from its header."""
    return checkpoint.tensors[name].shape


def checked_scale(scale: Tensor, name: str = "scales") -> Tensor:
    """`scale`, once it is known to be finite and nowhere 0, which no tool writes. Raises ValueError otherwise."""
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name} holds NaN or Inf")
    if not bool(scale.all()):
        raise ValueError(f"{name} holds zeros, which no quantizer writes; the file is damaged")
    return scale


def group_order(g_idx: Tensor, spec: LinearSpec) -> Tensor | None:
    """The permutation of inputs, int32 [K], by which each group's columns stand together; None if they do already.

    `g_idx` int [K] is the group of each input. All -1 says, as compressed-tensors means it, that there is no order.
    Raises ValueError if an index is out of range, or if groups are not all of the spec's size.
    """
    k, groups = spec.in_features, spec.groups
    if g_idx.is_floating_point() or tuple(g_idx.shape) != (k,):
        raise ValueError(f"g_idx is {g_idx.dtype} {tuple(g_idx.shape)}, expected integers ({k},)")
    g_idx = g_idx.long()
    if bool((g_idx == -1).all()):
        return None
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(f"g_idx holds {int(g_idx.min())} to {int(g_idx.max())}, and there are {groups} groups")
    if torch.equal(g_idx, torch.arange(k, device=g_idx.device) // spec.group_size):
        return None
    counts = torch.bincount(g_idx, minlength=groups)
    if bool((counts != spec.group_size).any()):
        raise ValueError(f"g_idx puts {int(counts.min())} to {int(counts.max())} inputs into a group, and the config "
                         f"says {spec.group_size}")
    return g_idx.argsort(stable=True).to(torch.int32)


def uneven_columns(codes: Tensor, scale: Tensor, zeros: Tensor, g_idx: Tensor | None, spec: LinearSpec
                   ) -> dict[str, Tensor]:
    """The tensors of int_columns, where a group may have fewer inputs than the spec's size. ValueError if one has more,
    or if an index is out of range."""
    k, size, groups = spec.in_features, spec.group_size, spec.groups
    group = torch.arange(k, device=codes.device) // size if g_idx is None else g_idx.long()
    if int(group.min()) < 0 or int(group.max()) >= groups:
        raise ValueError(f"g_idx holds {int(group.min())} to {int(group.max())}, and there are {groups} groups")
    if (most := int(torch.bincount(group).max())) > size:
        raise ValueError(f"g_idx puts {most} inputs into a group, and the config says {size}")
    return {"packed": pack_rows(codes, spec.weight.bits), "scale": scale, "zero": zeros,
            "group": group.to(torch.int32)}


def as_canonical(codes: Tensor, scale: Tensor, zero_point: Tensor | None, order: Tensor | None = None
                 ) -> dict[str, Tensor]:
    """Canonical tensors of codes int8 [N, K] in the file's order of inputs; a zero point that is 0 everywhere goes."""
    found = {"qweight": codes, "scale": scale}
    if zero_point is not None and bool(zero_point.any()):
        found["zero_point"] = zero_point
    if order is not None:
        found["qweight"], found["input_order"] = codes[:, order.long()].contiguous(), order
    return found
