"""Activation range: a block whose algorithms are done in, the static scale of each site that has one out."""

from __future__ import annotations

from qpass.activation_scale import ActivationScale
from qpass.calibrate.block_work import BlockWork
from qpass.calibrate.input_range import Histograms, InputRanges
from qpass.recipes.algorithm import ActivationRanges


def calibrate(settings: ActivationRanges, work: BlockWork) -> None:
    """Nothing yet: the ranges are measured when every algorithm of the block is done."""


def static_scales_of(work: BlockWork) -> dict[str, ActivationScale]:
    """Site name -> scale of its input's range over all samples, masked tokens left out.

    The range is from the smallest to the largest value, unless an ActivationRanges of the recipe says otherwise.

    Measured last, for smoothing changes the range of an input. Empty if no site of the block is static.
    """
    static = {name: site for name, site in work.sites.items()
              if site.spec.activation is not None and site.spec.activation.static}
    if not static:
        return {}
    ranges = InputRanges()
    work.observe(static, ranges.add)
    if unreached := [name for name in static if name not in ranges]:
        work.never_reached(unreached)
    for settings, names in work.aimed.items():
        chosen = {name: site for name, site in static.items() if name in names}
        if isinstance(settings, ActivationRanges) and settings.method != "minmax" and chosen:
            histograms = Histograms(ranges)
            work.observe(chosen, histograms.add)
            histograms.narrow(settings.method, settings.percentile, {
                name: site.spec.activation for name, site in chosen.items() if site.spec.activation is not None})
    found = {}
    for name, site in static.items():
        assert site.spec.activation is not None
        found[name] = ranges.scale(name, site.spec.activation, site.scale_dtype)
    return found
