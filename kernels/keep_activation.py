"""Keep activation: a spec in; the spec that a machine can compute out, weight-only where no kernel rounds the input."""

from __future__ import annotations

from qpass.kernels.registry import KERNELS, LinearCall, kernel
from qpass.spec import LinearSpec


def computable(call: LinearCall) -> tuple[LinearSpec, str]:
    """`call.spec` and "", or the spec with its activation left in float and the line that says so and why.

    Only what the activation is rounded to is given up, never the weight: if some kernel takes the call, or the
    reference knows the activation and refuses for another reason, the spec stays as it is.
    """
    if call.spec.activation is None or (why := kernel("linear_reference").takes(call)) is None:
        return call.spec, ""
    if any(one.why_not(call) is None for one in KERNELS.values()):
        return call.spec, ""
    dtype = str(call.dtype).removeprefix("torch.")
    return call.spec.weight_only(), f"activation kept in {dtype} on this machine: {why}"
