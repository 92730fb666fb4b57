"""Activation range: a block whose algorithms are done in, the static scale of each site that has one out."""

from __future__ import annotations

from qpass.activation_scale import ActivationScale
from qpass.calibrate.block_work import BlockWork
from qpass.calibrate.input_range import InputRanges


def static_scales_of(work: BlockWork) -> dict[str, ActivationScale]:
    """Site name -> scale of the smallest and the largest value of its input over all samples; masked tokens left out.

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
    found = {}
    for name, site in static.items():
        assert site.spec.activation is not None
        found[name] = ranges.scale(name, site.spec.activation, site.scale_dtype)
    return found
