"""Lanes of qpass: a scheme's name in, its packed layers on the kernel that the registry chooses out.

Names are `<family>_<granularity>[_asym][_int][_static][@<isa>]`, such as `w4a8_g128_int` (integer scales),
`w4a8_g128_static` (one scale for all inputs) or `w4a8_g128@avx2`: with an isa the kernel of that set is forced.
Several weights make one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from lane import FLOAT_INPUT, ROUNDED_INPUT, Floats, Lane, copies_for, few_or_all
from worker import Refused, serve

import qpass
from qpass.activation_scale import ActivationScale
from qpass.errors import QPassError
from qpass.kernels.isa import machine_has
from qpass.kernels.registry import LinearCall, choose, force_kernel
from qpass.layers.packed_layers import QuantLinear
from qpass.scheme import PRESETS, ActivationArgs, Scheme, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import quantize_weight

SCHEMES = (*(f"w4a8_{group}{asym}" for group in ("g32", "g64", "g128", "channel") for asym in ("", "_asym")),
           "w4a8_g128_int", "w4a8_g32_int", "w4a8_g128_static", "w8a8_channel", "w4a16_g128", "w4a16_g128_asym",
           "w4a16_g32", "w8a16_g128", "w8a16_channel")
FLOATS = ("mxfp4a16", "nvfp4a16", "nf4", "mxfp6a16", "mxfp8a16", "fp8_dynamic", "fp8_block")
"""Presets of which the weight is measured and activations stay in float."""
_LARGEST_INPUT = 4.5
ISAS = ("", "@amx", "@vnni", "@avx2", "@plain")


def scheme_of(name: str) -> Scheme:
    """`w4a8_g128_asym` and the like to the scheme that it names; a preset's name to its weight alone."""
    if name in FLOATS:
        return replace(PRESETS[name], activation=None)
    family, granularity, *rest = name.split("_")
    bits, input_bits = (int(part) for part in family[1:].split("a"))
    grouped = granularity.startswith("g")
    numbers: dict[str, Any] = {"scales": "integer"} if "int" in rest else {}
    if numbers and "scales" not in {field.name for field in fields(WeightArgs)}:
        raise Refused("this qpass has no integer scales")
    weight = WeightArgs(bits=bits, granularity="per_group" if grouped else "per_channel",
                        group_size=int(granularity[1:]) if grouped else None, symmetric="asym" not in rest, **numbers)
    rounded = ActivationArgs(granularity="per_tensor", dynamic=False) if "static" in rest else ActivationArgs()
    return Scheme(name=name, weight=weight, activation=rounded if input_bits == 8 else None)


def lane(name: str, weights: Sequence[Floats], rotate: int) -> Lane:
    """Copies of these weights [N, K] in this scheme."""
    scheme_name, _, isa = name.partition("@")
    scheme = scheme_of(scheme_name)
    which = "decode" if scheme_name in FLOATS else scheme.family
    try:
        with force_kernel(f"linear_{which}_{isa}") if isa else contextlib.nullcontext():
            first = [_layer(torch.from_numpy(weight).bfloat16(), scheme) for weight in weights]
    except QPassError as error:
        raise Refused(str(error).splitlines()[0]) from error
    nbytes = sum(layer.nbytes for layer in first)
    copies = [[tensor.clone() for layer in first for tensor in layer.packed]
              for _ in range(copies_for(nbytes, rotate) - 1)]
    copies.append([tensor for layer in first for tensor in layer.packed])
    return Lane(
        calls=few_or_all([_call(first, packed) for packed in copies]),
        take=lambda x: torch.from_numpy(x).bfloat16(),
        give=lambda y, rows: [torch.cat([one[rows] for one in y], 1).float().numpy()],
        weight=torch.cat([layer.dequantize(torch.float32) for layer in first]).numpy(), nbytes=nbytes,
        tolerance=ROUNDED_INPUT if scheme.activation else FLOAT_INPUT)


def _layer(weight: torch.Tensor, scheme: Scheme) -> QuantLinear:
    n, k = weight.shape
    spec = LinearSpec(family=scheme.family, weight=scheme.weight, activation=scheme.activation, out_features=n,
                      in_features=k)
    call = LinearCall(spec=spec, device=weight.device, dtype=weight.dtype)
    spec = spec.on(choose(call, prepare=True).kernel.name)
    static = spec.activation is not None and spec.activation.static
    scale = ActivationScale(scale=torch.tensor([_LARGEST_INPUT / 127])) if static else None
    return QuantLinear(quantize_weight(weight, spec), None, spec, weight.dtype, scale=scale)


def _call(layers: Sequence[QuantLinear], packed: list[torch.Tensor]) -> Callable[[torch.Tensor], Any]:
    """The call that an eager layer makes, or that a compiled graph makes of several layers."""
    specs = [layer.spec for layer in layers]
    if layers[0].activation_scale is not None:
        layer = deepcopy(layers[0])
        layer._buffers.update(zip(layer._names, packed, strict=True))
        return lambda x: (layer.multiply(x),)
    if len(specs) == 1:
        form = layers[0].kernel.forms["linear"]
        return lambda x: (form(x, packed, None, specs[0]),)
    form = layers[0].kernel.forms["linear_list"]
    bias = [None] * len(specs)
    return lambda x: form(x, packed, bias, specs)


def versions() -> dict[str, str]:
    """Of what a number of this library depends on."""
    return {"qpass": qpass.__version__, "PyTorch": torch.__version__, "kernels": (machine_has() or ("reference",))[0]}


if __name__ == "__main__":
    with torch.inference_mode():
        serve({name + isa: partial(lane, name + isa) for name in (*SCHEMES, *FLOATS) for isa in ISAS}, versions)
