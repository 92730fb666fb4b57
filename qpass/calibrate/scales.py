"""Scales wiring: every site of a block rounded to nearest on scales found from its weight and its input's energies."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.calibrate.block_work import BlockWork, SiteWork
from qpass.calibrate.gptq import by_input
from qpass.calibrate.scale_search import find_grid, round_to_grid
from qpass.recipes.algorithm import Scales

_LEAST = 0.01  # of the mean energy: a channel that few tokens use still counts


def calibrate(settings: Scales, work: BlockWork) -> None:
    """Settle every site; a number format of one's own is left to its codec."""
    groups = by_input([site for site in work.chosen(settings) if site.on_grid])
    energies = _energies(work, groups) if settings.searches and len(work.calls) else {}
    for group in groups:
        for site in group:
            work.tell(site.name)
            weight = site.weight.float()
            grid = find_grid(weight, site.spec, settings.method, site.scale_dtype, energies.get(group[0].name))
            site.settle(round_to_grid(weight, grid, site.spec, site.scale_dtype))


def _energies(work: BlockWork, groups: list[list[SiteWork]]) -> dict[str, Tensor]:
    """By the name of a group's first site: mean squares of its input's channels [K], each token's summing to 1."""
    found: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        squares = x.square()
        squares /= squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        found[name] = squares.sum(0) + found.get(name, 0)

    work.observe([group[0].name for group in groups], observe)
    return {name: (energy / energy.mean().clamp_min(1e-30)).clamp_min(_LEAST) for name, energy in found.items()}
