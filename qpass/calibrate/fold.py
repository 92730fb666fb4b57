"""Fold: a pair and a factor a channel in, its parameters changed so that the block computes the same; undone if not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qpass.calibrate.block_work import BlockWork, first_tensor
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
    got = first_tensor(next(work.outputs()))
    if bool(torch.isfinite(got).all()) and float((got - wanted).abs().max()) <= _TOLERANCE * float(wanted.abs().max()):
        return True
    for name, data in before.items():
        parameters[name].data = data
    work.notes.append(f"{', '.join(name for name, _ in pair.readers)}: rescaling its input changed the block's output; "
                      "taken back")
    return False


def _divide(parameter: nn.Parameter, taker: Taker, factors: Tensor) -> None:
    index = torch.tensor(taker.index, device=parameter.device)
    divisor = torch.ones(parameter.shape[taker.dim], device=parameter.device)
    divisor[index] = factors.to(divisor)
    shape = [1] * parameter.ndim
    shape[taker.dim] = -1
    parameter.data = ((parameter.data + taker.offset) / divisor.view(shape) - taker.offset).to(parameter.dtype)
