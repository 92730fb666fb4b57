"""Activation quantization: one float tensor in, int8 codes with their scales out, written in plain torch.

Inductor fuses these lines into whatever produced `x`; nothing here may become a custom op.

symmetric   (vLLM's dynamic int8)        scale = max(amax(|x|), EPS) / 127,  q = clamp(round(x / scale), -127, 127)
asymmetric  (compressed-tensors' token)  low = min(x, 0), high = max(x, 0), scale = max(high - low, EPS) / 255,
            zero_point = -128 - round(low / scale),  q = clamp(round(x / scale) + zero_point, -128, 127)
static      (vLLM's static int8)         q = clamp(round(x / scale) + zero_point, -128, 127), scale and zero point given
float8      (vLLM's dynamic fp8)         scale = max(amax(|x|), EPS) / 448,  q = e4m3(clamp(x / scale, -448, 448)),
            a scale for each token, or for each group of its inputs
microscaled (groups of 32: MX)           scale = power of two as of the MX weights, q = e4m3 or e2m1 of x / scale
All in float32, rounding half to even. A code that is not a number is 0: float NaN to int8 is not the same on every
path of a machine. A token with NaN or Inf has such a scale, which carries it into the product; a static scale knows
nothing of the token, so there Inf is the largest code and NaN is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qpass.activation_args import ActivationArgs
from qpass.codecs.elements import E2M1, to_codes, values
from qpass.codecs.microscaling import GROUP, power_of_two, shared_exponent

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-10  # keeps an all-zero token from dividing by zero; far below any real activation


def quantize_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] floating -> codes int8 [..., K], scale float32 [..., 1]."""
    x = x.float()
    # 127, not 128: -128 stays unused, so that x and -x round the same way.
    scale = x.abs().amax(-1, keepdim=True).clamp_min(EPS) / 127
    return _codes((x / scale).round().clamp(-127, 127)), scale


def quantize_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] floating -> codes int8 [..., K], scale float32 [..., 1], zero point float32 [..., 1] (an integer)."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(EPS) / 255
    zero_point = -128 - (low / scale).round()
    return _codes(((x / scale).round() + zero_point).clamp(-128, 127)), scale, zero_point


def quantize_float8(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] floating -> codes float8_e4m3fn [..., K], scale float32 [..., 1], or [..., K / group_size]."""
    x = x.float()
    groups = x if group_size is None else x.unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(EPS) / 448
    codes = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes, scale) if group_size is None else (codes.flatten(-2), scale.squeeze(-1))


def quantize_microscaled(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [..., K] floating, K % 32 == 0 -> codes [..., K], scale float32 [..., K / 32], a power of two.

    Codes are float8_e4m3fn for 8 bits, and for 4 too: it holds every value of e2m1.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    offset = 8 if bits == 8 else 2  # 448 = 1.75 * 2^8, 6 = 1.5 * 2^2
    scale = power_of_two(shared_exponent(groups, offset, 1))
    scale = torch.where(torch.isfinite(groups).all(-1, keepdim=True), scale, torch.nan)
    q = groups / scale
    q = q.clamp(-448, 448) if bits == 8 else values(E2M1, x.device)[to_codes(q, E2M1).int()]
    return q.to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1)


def cannot_round(activation: ActivationArgs, in_features: int) -> str | None:
    """Why `quantize_activation` does not round to these floats, or None. Integers are no business of its."""
    words = " ".join((activation.number, activation.granularity.replace("_", " ")))
    if activation.type != "float" or activation.dynamic is not True:
        how = "static scales" if activation.static else "scales below a calibrated one" if (
            activation.dynamic == "local") else "integers"
        return f"rounding to {words} with {how} is not emulated"
    if activation.granularity == "per_tensor":
        return f"rounding to {words} is not emulated: one scale of all tokens would make each depend on the others"
    if activation.bits == 4 and activation.group_size != GROUP:
        return f"rounding to {words} is not emulated, only in groups of {GROUP}"
    if activation.group_size and in_features % activation.group_size:
        return f"groups of {activation.group_size} do not divide {in_features} inputs"
    return None


def rounded(x: Tensor, activation: ActivationArgs) -> Tensor:
    """x [..., K] floating -> the values that it is rounded to, float32 [..., K], for a dynamic float activation."""
    codes, scale, _ = quantize_activation(x, activation)
    back: Tensor = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
    return back.flatten(-2)


def quantize_activation(x: Tensor, activation: ActivationArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point (or None) of a dynamic activation, of whatever numbers some kernel rounds to."""
    if activation.type == "float" and activation.group_size == GROUP:
        return (*quantize_microscaled(x, activation.bits), None)
    if activation.number == "fp8":
        return (*quantize_float8(x, activation.group_size), None)
    return (*quantize_symmetric(x), None) if activation.symmetric else quantize_asymmetric(x)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """x [..., K] floating, scale floating [1], zero point int8 [1] or None -> codes int8 [..., K]."""
    q = (x.float() / scale.float()).round()
    if zero_point is not None:
        q = q + zero_point.float()
    return _codes(q.clamp(-128, 127))


def static_rows(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A static scale as a product takes it, the same for each row of x [..., K]: float32 [..., 1], no copies."""
    rows = (*x.shape[:-1], 1)
    return scale.float().expand(rows), None if zero_point is None else zero_point.float().expand(rows)


def _codes(q: Tensor) -> Tensor:
    # NaN is what differs from itself: Inductor's isnan takes one number at a time, and four times as long in all.
    return torch.where(q != q, 0, q).to(torch.int8)
