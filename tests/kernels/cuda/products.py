"""Products for tests of the Triton programs: random weights of any format, and what float64 says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qpass.codecs  # noqa: F401
from qpass.activation_args import ActivationArgs
from qpass.kernels.cuda.launch import Rows
from qpass.kernels.cuda.layouts import CUDA_TILES, names
from qpass.kernels.reference.activation import quantize_activation
from qpass.scheme import WeightArgs, family_of
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight, quantize_weight

HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
INT8, INT8_ASYM = ActivationArgs(), ActivationArgs(symmetric=False)
FP8, FP8_GROUPS = ActivationArgs(type="float"), ActivationArgs(type="float", granularity="per_group", group_size=128)


def weight_args(text: str) -> WeightArgs:
    """`int4:g64:asym`, `int4:g64:integer`, `fp8:b128`, `nf4:g64`, `int8:channel`, `fp8:tensor`."""
    kind, group, *more = text.split(":")
    options: dict[str, Any] = {"symmetric": "asym" not in more, "scales": "integer" if "integer" in more else "amax"}
    if group[1:].isdigit():
        options |= {"granularity": "per_block" if group[0] == "b" else "per_group", "group_size": int(group[1:])}
    else:
        options |= {"granularity": f"per_{group}"}
    if kind.startswith("int"):
        return WeightArgs(bits=int(kind[3:]), **options)
    return WeightArgs(bits=8 if kind in ("fp8", "mxfp8") else 4, type=kind, **options)


def spec_for(weight: WeightArgs, activation: ActivationArgs | None, n: int, k: int, kernel: str = "linear_reference"
             ) -> LinearSpec:
    return LinearSpec(family=family_of(weight, activation), weight=weight, activation=activation, out_features=n,
                      in_features=k, kernel=kernel)


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """A packed weight, and its values in float64."""

    spec: LinearSpec
    canonical: CanonicalWeight
    packed: list[Tensor]
    values: Tensor


def make_product(spec: LinearSpec, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Product:
    draw = torch.Generator().manual_seed(seed)
    # A shift of the mean gives zero points something to do.
    weight = (torch.randn(spec.shape, generator=draw) + 0.3).to(dtype).to(device)
    canonical = quantize_weight(weight, spec)
    tensors = CUDA_TILES.pack(canonical, spec)
    return Product(spec=spec, canonical=canonical, packed=[tensors[name] for name in names(spec)],
                   values=dequantize_weight(canonical, spec).double())


def activation_rows(x: Tensor, activation: ActivationArgs | None) -> tuple[Rows, Tensor]:
    """What a program is given for x [M, K], and the float64 values that it stands for."""
    if activation is None:
        return Rows(x=x), x.double()
    codes, scale, zero_point = quantize_activation(x, activation)
    shifted = codes.double() if zero_point is None else codes.double() - zero_point.double()
    spread = scale.double().repeat_interleave(x.shape[-1] // scale.shape[-1], dim=-1)
    return Rows(x=codes, scale=scale, zero_point=zero_point), shifted * spread


def worst_error(y: Tensor, real: Tensor, product: Product, bias: Tensor | None) -> float:
    """The largest error in units of what is allowed: half an ulp of the result, and float32 sums."""
    exact, size = real @ product.values.t(), real.abs() @ product.values.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = HALF_ULP[y.dtype] * exact.abs() + 4e-6 * size + 2.0**-24
    assert y.shape == exact.shape
    return float(((y.double() - exact).abs() / allowed).nan_to_num(torch.inf).max()) if y.numel() else 0.0
