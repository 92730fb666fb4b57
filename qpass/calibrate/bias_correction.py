"""Bias correction wiring: mean inputs of each site in both models in; biases that take up the outputs' mean change out.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), with means that are
measured: b += W E[x] - Q E[x'], x the float model's input and x' the quantized one's, layer after layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qpass.calibrate.block_work import BlockWork, SiteWork
from qpass.calibrate.gptq import by_input
from qpass.recipes.algorithm import BiasCorrection


def calibrate(settings: BiasCorrection, work: BlockWork) -> None:
    """Change the biases of the block's sites; the integers stay as they are."""
    work.round_the_rest()
    chosen = [site for site in work.chosen(settings) if len(site.site.shape) == 2 and site.canonical is not None]
    parameters = work.parameters
    sites = [site for site in chosen if site.site.bias in parameters]
    if left := [site.name for site in chosen if site.site.bias not in parameters]:
        work.notes.append(f"bias_correction: {', '.join(left)} have no bias; left as they are")
    if not sites:
        return
    groups = by_input(sites)
    assert work.float_calls is not None
    with work.exact_weights(), _as_float(work):
        wanted = _means(work, [group[0] for group in groups], work.float_calls)
    for group in groups:
        name = group[0].name
        if name not in wanted:
            work.never_reached([site.name for site in group])
        got = _means(work, [group[0]], work.calls)[name]
        for site in group:
            bias = parameters[str(site.site.bias)]
            bias.data = bias.data + (site.exact @ wanted[name] - site.weight @ got).to(bias.dtype)


def _means(work: BlockWork, sites: Iterable[SiteWork], calls: Iterable[Any]) -> dict[str, Tensor]:
    """Mean input [K] of each site over all tokens that count."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), device=x.device)) + x.sum(0)
        rows[name] = rows.get(name, 0) + len(x)

    work.observe([site.name for site in sites], add, calls)
    return {name: total / rows[name] for name, total in sums.items()}


@contextmanager
def _as_float(work: BlockWork) -> Iterator[None]:
    """Within, activations are not rounded: nothing counts as settled."""
    held = {name: site.canonical for name, site in work.sites.items()}
    try:
        for site in work.sites.values():
            site.canonical = None
        yield
    finally:
        for name, site in work.sites.items():
            site.canonical = held[name]
