"""Keep activation: a spec in; the spec that a machine can compute out, its activation rounded, emulated or float."""

from __future__ import annotations

from dataclasses import replace

from qpass.kernels.registry import KERNELS, LinearCall, kernel, load_builtin
from qpass.spec import LinearSpec


def computable(call: LinearCall, *, exact: bool = False) -> tuple[LinearSpec, str]:
    """`call.spec` and "", or the spec as this machine can compute it and the line that says so and why.

    Only what the activation is rounded to is given up, never the weight: if some kernel takes the call, or the
    reference knows the activation and refuses for another reason, the spec stays as it is. With `exact` the rounding of
    float activations is emulated instead of given up, where that can be.
    """
    load_builtin(call)
    activation = call.spec.activation
    if activation is None or (why := kernel("linear_reference").takes(call)) is None:
        return call.spec, ""
    if any(one.why_not(call) is None for one in KERNELS.values()):
        return call.spec, ""
    emulated = replace(call.spec, exact=True)
    cannot = kernel("linear_reference").takes(replace(call, spec=emulated))
    if exact and cannot is None:
        shared = f"groups of {activation.group_size}" if activation.group_size else "token"
        return emulated, f"activation rounded to {activation.number} per {shared}, multiplied in float32"
    more = f"; {cannot}" if exact else "; exact=True emulates it" if cannot is None else ""
    return call.spec.weight_only(), f"activation kept in {call.dtype_name} on this machine: {why}{more}"
