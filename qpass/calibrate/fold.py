"""Fold: an input and a factor a channel in; parameters, or layers, changed so that the block computes the same.

What a change of the block's output shows to be wrong is undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qpass.calibrate.block_work import BlockWork, SiteWork, first_tensor
from qpass.calibrate.pairs import Pair, Taker

_TOLERANCE = 1e-3  # of the block's largest output; float32 rounding stays well below


def common_factors(pair: Pair, factors: Tensor) -> Tensor:
    """`factors` [K] made equal (their maximum) wherever channels of the input come from one channel of a producer."""
    for taker in pair.takers:
        index = torch.tensor(taker.index, device=factors.device)
        most = torch.zeros(int(index.max()) + 1, device=factors.device)
        factors = most.scatter_reduce(0, index, factors, "amax")[index]
    return factors


def fold(parameters: Mapping[str, nn.Parameter], pair: Pair, factors: Tensor) -> None:
    """Divide the input's channels by `factors` [K] where it is made, and multiply the columns that meet them."""
    for name, transposed in pair.readers:
        parameter = parameters[name]
        scale = factors.to(parameter)
        parameter.data = parameter.data * (scale[:, None] if transposed else scale)
    for taker in pair.takers:
        _divide(parameters[taker.parameter], taker, factors)


def fold_checked(work: BlockWork, pair: Pair, factors: Tensor) -> bool:
    """Fold, run the block once before and once after, and take it back unless the outputs agree."""
    parameters = work.parameters
    before = {name: parameters[name].data for name in pair.parameters}
    wanted = first_tensor(next(work.outputs()))
    fold(parameters, pair, factors)
    if _same(first_tensor(next(work.outputs())), wanted):
        return True
    for name, data in before.items():
        parameters[name].data = data
    work.notes.append(f"{', '.join(name for name, _ in pair.readers)}: rescaling its input changed the block's output; "
                      "taken back")
    return False


def scale_checked(work: BlockWork, group: Sequence[SiteWork], factors: Tensor) -> Tensor | None:
    """Let the layers of a group, which read one input, divide it by `factors` [K] at run time themselves.

    Returns the factors as they then are, their inverse stored in the weights' dtype; None if a layer of the group
    cannot, if nothing would change, or if the block's output did not stay the same.
    """
    scale = (1 / factors).to(group[0].scale_dtype)
    if not all(site.takes_change for site in group) or not bool(torch.isfinite(scale).all() & (scale != 0).all()) or (
            bool((scale == 1).all())):
        return None
    before = [(site, site.change, site.weight) for site in group]
    wanted = first_tensor(next(work.outputs()))
    for site, change, weight in before:
        whole = scale if change.scale is None else scale * change.scale
        divided = 1 / whole.float() if change.scale is None else change.scale.float() / whole.float()
        work.change_input(site, replace(change, scale=whole))
        site.weight = weight * divided
    if _same(first_tensor(next(work.outputs())), wanted):
        return divided
    for site, change, weight in before:
        work.change_input(site, change)
        site.weight = weight
    work.notes.append(f"{', '.join(site.name for site in group)}: scaling the input changed the block's output; taken "
                      "back")
    return None


def told_of_inputs(algorithm: str, left: Sequence[str], scaled: Sequence[str]) -> list[str]:
    """Notes for the report: sites whose input nothing can take factors off, and those that scale it themselves."""
    notes = []
    if scaled:
        notes.append(f"{algorithm}: no parameter can take factors off the input of {', '.join(scaled)}; these layers "
                     "scale it at run time, which qpass alone reads back (run_time: false leaves them as they are)")
    if left:
        notes.append(f"{algorithm}: nothing can take factors off the input of {', '.join(left)}; not rescaled")
    return notes


def _same(got: Tensor, wanted: Tensor) -> bool:
    return bool(torch.isfinite(got).all()) and float((got - wanted).abs().max()) <= _TOLERANCE * float(
        wanted.abs().max())


def _divide(parameter: nn.Parameter, taker: Taker, factors: Tensor) -> None:
    index = torch.tensor(taker.index, device=parameter.device)
    divisor = torch.ones(parameter.shape[taker.dim], device=parameter.device)
    divisor[index] = factors.to(divisor)
    shape = [1] * parameter.ndim
    shape[taker.dim] = -1
    parameter.data = ((parameter.data + taker.offset) / divisor.view(shape) - taker.offset).to(parameter.dtype)
