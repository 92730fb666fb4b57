"""SmoothQuant wiring: the largest value of each input channel observed, then factors folded or applied at run time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qpass.calibrate.awq import rounded_to_nearest
from qpass.calibrate.block_work import BlockWork, SiteWork
from qpass.calibrate.change_inputs import rounded, rounds_input
from qpass.calibrate.fold import common_factors, fold_checked, scale_checked, told_of_inputs
from qpass.calibrate.gptq import by_input
from qpass.calibrate.pairs import Pair
from qpass.calibrate.smoothquant_math import factors_of, search_factors
from qpass.recipes.algorithm import SmoothQuant

_ROWS = 512  # of an input, spread over the samples, on which alpha is searched
_EVEN = 0.5  # where the rounding of the input cannot be tried out: static scales, fp8, products inside a forward


def calibrate(settings: SmoothQuant, work: BlockWork) -> None:
    """Rescale the inputs of the block's sites: by parameters where a pair of the graph allows it, else, with
    `run_time`, in the layers that read them; those and what stays as it is are named in notes."""
    sites = work.chosen(settings)
    pairs = {name: pair for pair in work.pairs for name, _ in pair.readers}
    groups = [group for group in by_input(sites) if group[0].name in pairs or (
        settings.run_time and all(site.takes_change for site in group))]
    taken = {site.name for group in groups for site in group}
    left = [site.name for site in sites if site.name not in taken]
    scaled: list[str] = []
    if not groups:
        work.notes += told_of_inputs("smoothquant", left, scaled)
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
        pair = pairs.get(name)
        work.tell(name)
        factors = _factors(settings, work, group, pair, amax[name], rows.pop(name))
        if (pair is None or not fold_checked(work, pair, factors)) and settings.run_time and (
                scale_checked(work, group, factors) is not None):
            scaled += [site.name for site in group]
    work.notes += told_of_inputs("smoothquant", left, scaled)


def _factors(settings: SmoothQuant, work: BlockWork, group: list[SiteWork], pair: Pair | None, x_amax: Tensor,
             rows: list[Tensor]) -> Tensor:
    common: Callable[[Tensor], Tensor] = (lambda s: s) if pair is None else partial(common_factors, pair)
    w_amax = _columns(work, pair) if pair is not None else torch.stack(
        [site.weight.float().abs().amax(0) for site in group]).amax(0)
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
