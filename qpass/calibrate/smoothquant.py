"""SmoothQuant wiring: the largest value of each input channel observed, then factors folded pair by pair."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qpass.calibrate.awq import rounded_to_nearest
from qpass.calibrate.block_work import BlockWork, SiteWork, rounded, rounds_input
from qpass.calibrate.fold import common_factors, fold_checked
from qpass.calibrate.gptq import by_input
from qpass.calibrate.pairs import Pair
from qpass.calibrate.smoothquant_math import factors_of, search_factors
from qpass.recipes.algorithm import SmoothQuant

_ROWS = 512  # of an input, spread over the samples, on which alpha is searched
_EVEN = 0.5  # where the rounding of the input cannot be tried out: static scales, fp8, products inside a forward


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
    rows: dict[str, list[Tensor]] = {}
    share = max(1, _ROWS // max(1, len(work.calls)))

    def observe(name: str, x: Tensor) -> None:
        here = x.abs().amax(0)
        amax[name] = torch.maximum(amax[name], here) if name in amax else here
        rows.setdefault(name, []).append(x[::max(1, len(x) // share)][:share].clone())

    work.observe([group[0].name for group in groups], observe)
    for group in groups:
        name = group[0].name
        if name not in amax:
            work.never_reached([site.name for site in group])
        pair = pairs[name]
        work.tell(name)
        fold_checked(work, pair, _factors(settings, work, group, pair, amax[name], rows.pop(name)))


def _factors(settings: SmoothQuant, work: BlockWork, group: list[SiteWork], pair: Pair, x_amax: Tensor,
             rows: list[Tensor]) -> Tensor:
    common, w_amax = partial(common_factors, pair), _columns(work, pair)
    args = group[0].spec.activation
    known = all(site.on_grid for site in group) and (args is None or rounds_input(group[0]))
    if settings.alpha is not None or not known:
        return common(factors_of(x_amax, w_amax, _EVEN if settings.alpha is None else settings.alpha))
    return search_factors(torch.cat(rows), [site.weight.float() for site in group],
                          (lambda x: x) if args is None else (lambda x: rounded(x, args)),
                          [rounded_to_nearest(site) for site in group], x_amax, w_amax, common)


def _columns(work: BlockWork, pair: Pair) -> Tensor:
    """The largest weight of each column over all products that read the input."""
    parts = []
    for name, transposed in pair.readers:
        weight = work.parameters[name].detach().float()
        parts.append(weight.abs().amax(1 if transposed else 0))
    return torch.stack(parts).amax(0)
