"""Activation range: a block whose algorithms are done in, the static scale of each site that has one out."""

from __future__ import annotations

from torch import Tensor

from qpass.activation_scale import ActivationScale, scale_of_range
from qpass.calibrate.block_work import BlockWork


def static_scales_of(work: BlockWork) -> dict[str, ActivationScale]:
    """Site name -> scale of the smallest and the largest value of its input over all samples; masked tokens left out.

    Measured last, for smoothing changes the range of an input. Empty if no site of the block is static.
    """
    static = {name: site for name, site in work.sites.items()
              if site.spec.activation is not None and site.spec.activation.static}
    if not static:
        return {}
    ranges: dict[str, tuple[float, float]] = {}

    def observe(name: str, x: Tensor) -> None:
        low, high = (float(value) for value in x.aminmax())
        before = ranges.get(name, (low, high))
        ranges[name] = min(before[0], low), max(before[1], high)

    work.observe(static, observe)
    if unreached := [name for name in static if name not in ranges]:
        work.never_reached(unreached)
    found = {}
    for name, site in static.items():
        assert site.spec.activation is not None
        found[name] = scale_of_range(*ranges[name], site.spec.activation, site.scale_dtype)
    return found
