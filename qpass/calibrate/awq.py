"""AWQ wiring: statistics of each input gathered, factors searched and folded pair by pair, then ranges clipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qpass.calibrate.awq_math import search_factors
from qpass.calibrate.block_work import BlockWork, SiteWork
from qpass.calibrate.fold import common_factors, fold_checked
from qpass.calibrate.gptq import by_input
from qpass.calibrate.hessian import Hessian
from qpass.calibrate.scale_search import find_grid, round_to_grid
from qpass.recipes.algorithm import Awq
from qpass.weight import dequantize_weight


def calibrate(settings: Awq, work: BlockWork) -> None:
    """Rescale inputs that a pair of the graph allows, name the others in a note; with `clip` also round the sites."""
    sites = [site for site in work.chosen(settings) if site.on_grid]
    pairs = {name: pair for pair in work.pairs for name, _ in pair.readers}
    groups = by_input(sites)
    hessians = {group[0].name: Hessian(group[0].spec.in_features) for group in groups}
    means: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        hessians[name].add(x)
        means[name] = means.get(name, torch.zeros((), device=x.device)) + x.abs().sum(0)

    work.observe(list(hessians), observe)
    left = []
    for group in groups:
        name = group[0].name
        if not hessians[name].rows:
            work.never_reached([site.name for site in group])
        pair = pairs.get(name)
        if pair is None:
            left += [site.name for site in group]
            continue
        work.tell(name)
        factors = search_factors([site.weight.float() for site in group], [rounded_to_nearest(site) for site in group],
                                 means[name] / hessians[name].rows, hessians[name].value, grid=settings.grid,
                                 duo=settings.duo_scaling, common=partial(common_factors, pair))
        if fold_checked(work, pair, factors):
            hessians[name].divide(factors)
    if left:
        work.notes.append(f"awq: nothing can take factors off the input of {', '.join(left)}; not rescaled")
    if settings.clip:
        for group in groups:
            for site in group:
                weight, energy = site.weight.float(), hessians[group[0].name].value.diagonal()
                grid = find_grid(weight, site.spec, "search", site.scale_dtype, energy / energy.mean().clamp_min(1e-30))
                site.settle(round_to_grid(weight, grid, site.spec, site.scale_dtype))


def rounded_to_nearest(site: SiteWork) -> Callable[[Tensor], Tensor]:
    """Rounding to nearest on the site's scheme, back in float32."""
    def round_it(weight: Tensor) -> Tensor:
        grid = find_grid(weight, site.spec, "absmax", site.scale_dtype)
        return dequantize_weight(round_to_grid(weight, grid, site.spec, site.scale_dtype), site.spec)

    return round_it
