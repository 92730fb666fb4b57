"""AWQ wiring: statistics of each input gathered, factors searched and folded or applied at run time, ranges clipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qpass.calibrate.awq_math import search_factors
from qpass.calibrate.block_work import BlockWork, SiteWork
from qpass.calibrate.fold import common_factors, fold_checked, scale_checked, told_of_inputs
from qpass.calibrate.gptq import by_input
from qpass.calibrate.hessian import Hessian
from qpass.calibrate.scale_search import find_grid, round_to_grid
from qpass.recipes.algorithm import Awq
from qpass.weight import dequantize_weight


def calibrate(settings: Awq, work: BlockWork) -> None:
    """Rescale every input: by parameters where a pair of the graph allows it, else, with `run_time`, in the layers
    that read it; name in notes which those are and what stays as it is. With `clip` also round the sites."""
    sites = [site for site in work.chosen(settings) if site.on_grid]
    pairs = {name: pair for pair in work.pairs for name, _ in pair.readers}
    groups = by_input(sites)
    hessians = {group[0].name: Hessian(group[0].spec.in_features) for group in groups}
    means: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        hessians[name].add(x)
        means[name] = means.get(name, torch.zeros((), device=x.device)) + x.abs().sum(0)

    work.observe(list(hessians), observe)
    left, scaled = [], []
    for group in groups:
        name = group[0].name
        if not hessians[name].rows:
            work.never_reached([site.name for site in group])
        pair = pairs.get(name)
        names = [site.name for site in group]
        if pair is None and not (settings.run_time and all(site.takes_change for site in group)):
            left += names
            continue
        work.tell(name)
        factors = search_factors([site.weight.float() for site in group], [rounded_to_nearest(site) for site in group],
                                 means[name] / hessians[name].rows, hessians[name].value, grid=settings.grid,
                                 duo=settings.duo_scaling,
                                 common=(lambda s: s) if pair is None else partial(common_factors, pair))
        if pair is not None and fold_checked(work, pair, factors):
            hessians[name].divide(factors)
        elif settings.run_time and (done := scale_checked(work, group, factors)) is not None:
            hessians[name].divide(done)
            scaled += names
    work.notes += told_of_inputs("awq", left, scaled)
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
