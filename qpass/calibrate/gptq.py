"""GPTQ wiring: the Hessians of a block's inputs gathered in one run, then every site rounded by `gptq_math`."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.calibrate.block_work import BlockWork, SiteWork
from qpass.calibrate.experts import calibrate_experts, given_to
from qpass.calibrate.gptq_math import energy_order, gptq, inverse_factor, polish
from qpass.calibrate.hessian import Hessian
from qpass.calibrate.kept_outputs import KeptOutputs
from qpass.calibrate.match_float import float_side, lacking
from qpass.calibrate.scale_search import Grid, canonical_of, find_grid, grid_ends
from qpass.errors import CalibrationError
from qpass.recipes.algorithm import Gptq

_ROWS_A_COLUMN = 2  # below that halves of the data have too little to confirm each other


def calibrate(settings: Gptq, work: BlockWork) -> None:
    """Round the block's sites, those that share an input with one Hessian, then its experts, each with its own."""
    _linears(settings, work)
    for experts in work.experts:
        if any(decision.site.name in work.aimed[settings] for decision in experts.decisions):
            work.notes += calibrate_experts(settings, experts, given_to(experts, work), work.tell)


def _linears(settings: Gptq, work: BlockWork) -> None:
    groups = by_input([site for site in work.chosen(settings) if site.on_grid])
    if settings.matches_float and work.float_calls is not None:
        exact = float_side(work, groups)
        if not work.experts:  # they are rounded last, and modules hold them
            work.kept = KeptOutputs(work.module, [site.owner for group in groups for site in group], work.calls.budget)
        for group in groups:
            found = lacking(work, group, exact)
            hessian = found.hessian
            enough = hessian.rows >= _ROWS_A_COLUMN * group[0].spec.in_features and all(h.rows for h in found.hessians)
            if not enough and hessian.rows:
                names = ", ".join(site.name for site in group)
                work.notes.append(f"gptq: {names} saw {hessian.rows} tokens, too few to make up for errors before it; "
                                  "rounded for itself")
            _round(settings, work, group, hessian, found.changes() if enough else None)
        exact.clear()
        return
    hessians = {group[0].name: Hessian(group[0].spec.in_features) for group in groups}
    work.observe(list(hessians), lambda name, x: hessians[name].add(x))
    for group in groups:
        _round(settings, work, group, hessians.pop(group[0].name))


def by_input(sites: list[SiteWork]) -> list[list[SiteWork]]:
    """Sites in lists that read one and the same input, in order."""
    groups: dict[object, list[SiteWork]] = {}
    for site in sites:
        shared = site.site.shared_input
        groups.setdefault(site.name if shared is None else shared, []).append(site)
    return list(groups.values())


def _round(settings: Gptq, work: BlockWork, group: list[SiteWork], seen: Hessian,
           changes: list[Tensor] | None = None) -> None:
    if seen.rows == 0:
        work.never_reached([site.name for site in group])
        return
    work.tell(group[0].name)
    hessian = seen.value
    order = energy_order(hessian, settings.actorder)
    try:
        factor = inverse_factor(hessian, order, settings.dampening_frac)
    except ValueError as error:
        raise CalibrationError(f"{group[0].name}: {error}; raise gptq's dampening_frac, or look for extreme values in "
                               "the calibration data") from error
    if factor.dampening != settings.dampening_frac:
        work.notes.append(f"gptq: the Hessian of {', '.join(site.name for site in group)} was not positive definite; "
                          f"dampening raised from {settings.dampening_frac:g} to {factor.dampening:g}")
    importance = factor.importance(order)
    alike: dict[object, list[tuple[SiteWork, Tensor, Grid]]] = {}
    for index, site in enumerate(group):
        weight = site.weight.float()
        if changes is not None:
            weight = weight + changes[index]
        grid = find_grid(weight, site.spec, settings.scales, site.scale_dtype, importance, compensated=True)
        alike.setdefault((site.spec.weight, site.scale_dtype), []).append((site, weight, grid))
    for members in alike.values():  # one kind of grid: their rows are rounded together
        zeros = [grid.zero_point for _, _, grid in members if grid.zero_point is not None]
        whole = Grid(torch.cat([grid.scale for _, _, grid in members]), torch.cat(zeros) if zeros else None)
        weight, spec, dtype = torch.cat([w for _, w, _ in members]), members[0][0].spec, members[0][0].scale_dtype
        free = spec.weight.granularity != "per_tensor" and spec.weight.scales != "integer"
        codes = gptq(weight, factor, order, whole, grid_ends(spec), settings.block_size)
        codes, whole = polish(codes, whole, weight, hessian, grid_ends(spec), dtype, refits=settings.refit and free,
                              sweeps=settings.sweeps, dampening=factor.dampening)
        sizes = [site.spec.out_features for site, _, _ in members]
        parts = [None] * len(sizes) if whole.zero_point is None else whole.zero_point.split(sizes)
        for (site, _, _), own, scale, zero in zip(members, codes.split(sizes), whole.scale.split(sizes), parts,
                                                  strict=True):
            site.settle(canonical_of(own, Grid(scale, zero), site.scale_dtype))
