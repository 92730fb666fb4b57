"""GPTQ wiring: the Hessians of a block's inputs gathered in one run, then every site rounded by `gptq_math`."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.algorithm import Gptq
from qpass.calibrate.block_work import BlockWork, SiteWork
from qpass.calibrate.gptq_math import energy_order, gptq, inverse_factor
from qpass.calibrate.scale_search import Grid, canonical_of, find_grid, grid_ends
from qpass.errors import CalibrationError

_PANEL = 384  # columns: narrower ones multiply less and slower



def calibrate(settings: Gptq, work: BlockWork) -> None:
    """Round the block's sites; those that share an input share a Hessian."""
    sites = [site for site in work.chosen(settings) if site.on_grid]
    groups = by_input(sites)
    hessians = {group[0].name: Hessian(group[0].spec.in_features) for group in groups}
    work.observe(list(hessians), lambda name, x: hessians[name].add(x))
    for group in groups:
        hessian = hessians.pop(group[0].name)
        if hessian.rows == 0:
            work.never_reached([site.name for site in group])
            continue
        work.tell(group[0].name)
        _round(settings, work, group, hessian.value)


class Hessian:
    """X^T X over all rows seen, float32 [K, K]. Only panels that touch the upper triangle are multiplied."""

    def __init__(self, size: int) -> None:
        self.rows = 0
        self._upper = torch.zeros(size, size)

    def add(self, x: Tensor) -> None:
        self._upper = self._upper.to(x.device)
        for start in range(0, x.shape[1], _PANEL):
            stop = start + _PANEL
            self._upper[:stop, start:stop].addmm_(x[:, :stop].t(), x[:, start:stop])
        self.rows += len(x)

    def divide(self, factors: Tensor) -> None:
        """What it is once the input's channels are divided by `factors` [K]."""
        self._upper = self._upper / factors / factors[:, None]

    @property
    def value(self) -> Tensor:
        """The whole symmetric matrix."""
        return self._upper.triu().add_(self._upper.triu(1).t())


def by_input(sites: list[SiteWork]) -> list[list[SiteWork]]:
    """Sites in lists that read one and the same input, in order."""
    groups: dict[object, list[SiteWork]] = {}
    for site in sites:
        shared = site.site.shared_input
        groups.setdefault(site.name if shared is None else shared, []).append(site)
    return list(groups.values())


def _round(settings: Gptq, work: BlockWork, group: list[SiteWork], hessian: Tensor) -> None:
    order = energy_order(hessian, settings.actorder)
    try:
        factor = inverse_factor(hessian, order, settings.dampening_frac)
    except ValueError as error:
        raise CalibrationError(f"{group[0].name}: {error}; raise gptq's dampening_frac, or look for extreme values in "
                               "the calibration data") from error
    if factor.dampening != settings.dampening_frac:
        work.notes.append(f"gptq: the Hessian of {', '.join(site.name for site in group)} was not positive definite; "
                          f"dampening raised from {settings.dampening_frac:g} to {factor.dampening:g}")
    importance = hessian.diagonal() / hessian.diagonal().mean().clamp_min(1e-30)
    alike: dict[object, list[tuple[SiteWork, Tensor, Grid]]] = {}
    for site in group:
        weight = site.weight.float()
        grid = find_grid(weight, site.spec, settings.scales, site.scale_dtype, importance)
        alike.setdefault(site.spec.weight, []).append((site, weight, grid))
    for members in alike.values():  # one grid kind: their rows are rounded together
        zeros = [grid.zero_point for _, _, grid in members if grid.zero_point is not None]
        whole = Grid(torch.cat([grid.scale for _, _, grid in members]), torch.cat(zeros) if zeros else None)
        codes = gptq(torch.cat([weight for _, weight, _ in members]), factor, order, whole,
                     grid_ends(members[0][0].spec), settings.block_size)
        for (site, _, grid), own in zip(members, codes.split([site.spec.out_features for site, _, _ in members]),
                                        strict=True):
            site.settle(canonical_of(own, grid, site.scale_dtype))
