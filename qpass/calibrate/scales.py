"""Scales wiring: every site of a block rounded to nearest on scales found from its weight alone."""

from __future__ import annotations

from qpass.calibrate.block_work import BlockWork
from qpass.calibrate.scale_search import find_grid, round_to_grid
from qpass.recipes.algorithm import Scales


def calibrate(settings: Scales, work: BlockWork) -> None:
    """Settle every site; a number format of one's own is left to its codec."""
    for site in work.chosen(settings):
        if site.on_grid:
            weight = site.weight.float()
            grid = find_grid(weight, site.spec, settings.method, site.scale_dtype)
            site.settle(round_to_grid(weight, grid, site.spec, site.scale_dtype))
