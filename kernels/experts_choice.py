"""Experts choice: a layer of experts in, its spec on the kernels that run it out; and its blocks, packed for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qpass import large_pages
from qpass.experts_spec import ExpertsSpec
from qpass.kernels.layout import Packed
from qpass.kernels.registry import ExpertsCall, LinearCall, choose, kernel
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight


def choose_experts(call: ExpertsCall, *, where: str = "", prepare: bool = False) -> tuple[ExpertsSpec, dict[str, str]]:
    """The spec, its `kernel` and its parts' kernels set, and why each better kernel refused.

    A kernel of experts that names a linear kernel gets blocks in that one's layout; any other gets the best linear
    kernel for each part. Raises NoKernel as `registry.choose` does.
    """
    choice = choose(call, where=where, prepare=prepare)
    refusals = dict(choice.refusals)
    names: list[str | None] = []
    for part in call.spec.parts:
        if part is None:
            names.append(None)
        elif choice.kernel.linear is not None:
            names.append(choice.kernel.linear)
        else:
            inner = choose(LinearCall(spec=part, device=call.device, dtype=torch.float32), where=where,
                           prepare=prepare)
            refusals.update(inner.refusals)
            names.append(inner.kernel.name)
    return call.spec.on(choice.kernel.name, *names), refusals


def pack_blocks(weights: Iterable[CanonicalWeight | Packed], part: LinearSpec, experts: int) -> Packed:
    """Weights [N, K], one an expert in order, packed for `part.kernel`: its layout's tensors with a leading dimension.

    They may be packed for it already. Weights are taken one at a time, so that an iterator need hold only one.
    """
    layout = kernel(part.kernel).layout
    blocks: Packed = {}
    for expert, weight in enumerate(weights):
        packed = weight if isinstance(weight, dict) else layout.pack(weight, part)
        if layout.even is not None:
            packed = layout.even(packed, part)
        for name in layout.names(part):
            if name not in blocks:
                blocks[name] = _empty((experts, *packed[name].shape), packed[name])
            blocks[name][expert] = packed[name]
    return blocks


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.device.type == "cpu" and type(like) is Tensor:
        return large_pages.empty(shape, like.dtype)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def unpack_block(packed: Sequence[Tensor], part: LinearSpec, expert: int) -> CanonicalWeight:
    """One expert's weight in canonical form."""
    layout = kernel(part.kernel).layout
    return layout.unpack({name: tensor[expert] for name, tensor in zip(layout.names(part), packed, strict=True)}, part)
