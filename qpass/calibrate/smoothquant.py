"""SmoothQuant wiring: the largest value of each input channel observed, then factors folded pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.calibrate.block_work import BlockWork
from qpass.calibrate.fold import common_factors, fold_checked
from qpass.calibrate.gptq import by_input
from qpass.calibrate.pairs import Pair
from qpass.recipes.algorithm import SmoothQuant

_SMALLEST = 1e-5  # of a factor; keeps channels that are never used finite


def calibrate(settings: SmoothQuant, work: BlockWork) -> None:
    """Rescale the inputs of the block's sites that a pair of the graph allows; the others are named in a note."""
    sites = work.chosen(settings)
    pairs = {name: pair for pair in work.pairs for name, _ in pair.readers}
    groups = [group for group in by_input(sites) if group[0].name in pairs]
    left = [site.name for site in sites if site.name not in pairs]
    if left:
        work.notes.append(f"smoothquant: nothing can take factors off the input of {', '.join(left)}; left as they are")
    if not groups:
        return
    amax: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        here = x.abs().amax(0)
        amax[name] = torch.maximum(amax[name], here) if name in amax else here

    work.observe([group[0].name for group in groups], observe)
    for group in groups:
        if group[0].name not in amax:
            work.never_reached([site.name for site in group])
        pair = pairs[group[0].name]
        fold_checked(work, pair, common_factors(pair, factors_of(amax[group[0].name], _columns(work, pair),
                                                                 settings.alpha)))


def factors_of(x_amax: Tensor, w_amax: Tensor, alpha: float) -> Tensor:
    """s [K] = amax(|x|)^alpha / amax(|w|)^(1 - alpha); 1 for a channel that is zero in the input or in the weights."""
    s = x_amax.clamp_min(_SMALLEST).pow(alpha) / w_amax.clamp_min(_SMALLEST).pow(1 - alpha)
    return torch.where((x_amax == 0) | (w_amax == 0), 1.0, s.clamp_min(_SMALLEST))


def _columns(work: BlockWork, pair: Pair) -> Tensor:
    """The largest weight of each column over all products that read the input."""
    parts = []
    for name, transposed in pair.readers:
        weight = work.parameters[name].detach().float()
        parts.append(weight.abs().amax(1 if transposed else 0))
    return torch.stack(parts).amax(0)


