"""Layouts: canonical weights in, the tensors that the Triton programs read out, and back, bit for bit.

Weights of up to 4 bits lie in tiles of 16 rows x 64 inputs, 512 bytes one after the other: byte j of a row holds input
j in its low and input 32 + j in its high nibble, so that 16 bytes are loaded at once, neighbouring threads read
neighbouring memory, and both nibbles of a byte meet inputs of the same position. Integers are two's complement.
Wider weights stay bytes, rows of K padded to 16, which is what torch's own kernels take too. Rows are padded to 16.

    bits <= 4   [Np / 16, Kp / 64, 16, 32] uint8, Kp a multiple of 64
    8 bits      [Np, Kp] int8 or float8, Kp a multiple of 16
    scales      [G, Np], a row for each group, since programs read those of many rows at once; [G, N / 128] of blocks

Integer scales (qpass/integer_scales.py) are found here: then `scale` is int8 [5 + G, Np], whose first rows hold a
float32 for each row of the weight and the dtype that the scales had, and the others the multipliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import WeightError
from qpass.integer_scales import factor
from qpass.kernels.layout import CANONICAL, Layout, Packed
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

ROWS, TILE = 16, 64
LARGEST_GROUP = (1 << 17) - 1  # times 128 * 128, the largest sum of products that int32 holds
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_ROWS = 5  # of bytes before the multipliers


def padded(size: int, to: int) -> int:
    """The smallest multiple of `to` that is at least `size`."""
    return -(-size // to) * to


def halved(spec: LinearSpec) -> bool:
    """Whether two weights share a byte."""
    return spec.weight.bits <= 4


def padded_inputs(spec: LinearSpec) -> int:
    """Inputs of a packed row, padding included."""
    return padded(spec.in_features, TILE if halved(spec) else ROWS)


def names(spec: LinearSpec) -> tuple[str, ...]:
    """The canonical tensors, and the column sums that asymmetric activations need."""
    colsum = ("colsum",) if spec.activation is not None and not spec.activation.symmetric else ()
    return (*CANONICAL.names(spec), *colsum)


def to_tiles(codes: Tensor) -> Tensor:
    """uint8 codes below 16 [N, K] -> [Np / 16, Kp / 64, 16, 32]."""
    n, k = codes.shape
    whole = codes.new_zeros(padded(n, ROWS), padded(k, TILE))
    whole[:n, :k] = codes
    low, high = whole.view(-1, ROWS, whole.shape[1] // TILE, 2, TILE // 2).unbind(3)
    return (low | high << 4).permute(0, 2, 1, 3).contiguous()


def from_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse: uint8 [n, k]."""
    rows = tiles.permute(0, 2, 1, 3)
    return torch.stack((rows & 15, rows >> 4), dim=3).reshape(tiles.shape[0] * ROWS, -1)[:n, :k].contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    """Floats of 8 bits as integers, which more operations of torch know."""
    return tensor.view(torch.uint8) if tensor.dtype.is_floating_point and tensor.element_size() == 1 else tensor


def _wide(tensor: Tensor) -> Tensor:
    """[N, K] of bytes, padded."""
    n, k = tensor.shape
    source = _bytes(tensor)
    whole = source.new_zeros(padded(n, ROWS), padded(k, ROWS))
    whole[:n, :k] = source
    return whole.view(tensor.dtype)


def _turned(scale: Tensor, spec: LinearSpec) -> Tensor:
    """[N, G] -> [G, Np]; block and tensor scales are not padded."""
    source = _bytes(scale)
    if spec.weight.granularity == "per_block" or scale.dim() == 1:
        return source.view(source.shape[0], -1).t().contiguous().view(scale.dtype)
    n, groups = source.shape
    whole = source.new_zeros(groups, padded(n, ROWS))
    whole[:, :n] = source.t()
    return whole.view(scale.dtype)


def _back(turned: Tensor, n: int) -> Tensor:
    # clone(), for contiguous() keeps the strides of a single column.
    return _bytes(turned)[:, :n].t().clone(memory_format=torch.contiguous_format).view(turned.dtype)


def _integer_scale(scale: Tensor, spec: LinearSpec) -> Tensor | None:
    activation = spec.activation
    if (activation is None or activation.number != "int8" or not activation.symmetric or not spec.weight.symmetric
            or spec.groups < 2 or spec.weight.bits > 4 or spec.group_size % 32):
        return None
    parts = factor(scale)
    if parts is None:
        return None
    multiplier, channel = parts
    n, groups = multiplier.shape
    whole = torch.zeros(INTEGER_ROWS + groups, padded(n, ROWS), dtype=torch.int8, device=scale.device)
    channels = torch.zeros(padded(n, ROWS), device=scale.device)
    channels[:n] = channel
    whole[:4] = channels.view(torch.int8).view(4, -1)
    whole[4] = FLOATS.index(scale.dtype)
    whole[INTEGER_ROWS:, :n] = multiplier.t()
    return whole


def channels_of(scale: Tensor) -> Tensor:
    """The float32 scale of each row [Np] of an integer `scale`."""
    return scale.narrow(0, 0, 4).reshape(-1).view(torch.float32)


def plain_scale(scale: Tensor) -> Tensor:
    """[G, Np] in the dtype that the scales had."""
    if scale.dtype != torch.int8:
        return scale
    dtype = FLOATS[int(scale[4, 0])]
    return (scale[INTEGER_ROWS:] * channels_of(scale)).to(dtype)


def _colsum(weight: CanonicalWeight, spec: LinearSpec) -> Tensor:
    """Sum of each row's weights, float32 [Np]."""
    sums = weight.qweight.unflatten(-1, (spec.groups, -1)).sum(-1, dtype=torch.int32).double()
    if weight.zero_point is not None:
        sums -= weight.zero_point.double() * spec.group_size
    whole = torch.zeros(padded(spec.out_features, ROWS), device=sums.device)
    whole[:spec.out_features] = (sums * weight.scale.double()).sum(-1)
    return whole


def _pack(weight: CanonicalWeight, spec: LinearSpec) -> Packed:
    t = weight.tensors
    n, k = spec.shape
    if spec.weight.type == "int":
        q = weight.qweight
        integer = _integer_scale(weight.scale, spec)
        packed = {"qweight": to_tiles(q.view(torch.uint8) & 15) if halved(spec) else _wide(q),
                  "scale": _turned(weight.scale, spec) if integer is None else integer}
        if weight.zero_point is not None:
            packed["zero_point"] = _turned(weight.zero_point, spec)
        if "colsum" in names(spec):
            packed["colsum"] = _colsum(weight, spec)
        return packed
    if "absmax" in t:  # two in a byte, the even one high; blocks of a flattened weight that do not run across rows
        flat = torch.stack((t["packed"] >> 4, t["packed"] & 15), dim=-1).view(-1)[:n * k]
        return {"packed": to_tiles(flat.view(n, k)), "absmax": _turned(t["absmax"].view(n, -1), spec),
                "code": t["code"]}
    if "packed" in t:
        codes = torch.stack((t["packed"] & 15, t["packed"] >> 4), dim=-1).view(n, -1)
        return {**t, "packed": to_tiles(codes), "scale": _turned(t["scale"], spec)}
    if t["weight"].dtype == torch.float8_e5m2 and spec.activation is not None:
        raise WeightError(f"{spec}: products of float8 activations take float8_e4m3fn weights, not float8_e5m2; "
                          "load it with a recipe that leaves activations in float")
    return {"weight": _wide(t["weight"]), "scale": _turned(t["scale"], spec)}


def _unpack(packed: Packed, spec: LinearSpec) -> CanonicalWeight:
    n, k = spec.shape
    if spec.weight.type == "int":
        q = packed["qweight"]
        if halved(spec):
            q = ((from_tiles(q, n, k) ^ 8).to(torch.int16) - 8).to(torch.int8)
        tensors = {"qweight": q[:n, :k].contiguous(), "scale": _back(plain_scale(packed["scale"]), n)}
        if not spec.weight.symmetric:
            tensors["zero_point"] = _back(packed["zero_point"], n)
        return CanonicalWeight(tensors)
    if "absmax" in packed:
        flat = torch.nn.functional.pad(from_tiles(packed["packed"], n, k).view(-1), (0, n * k % 2))
        return CanonicalWeight({"packed": flat[0::2] << 4 | flat[1::2],
                                "absmax": _back(packed["absmax"], n).view(-1), "code": packed["code"]})
    scale = packed["scale"]
    scale = scale.view(-1) if spec.weight.granularity == "per_tensor" else _back(
        scale, scale.shape[1] if spec.weight.granularity == "per_block" else n)
    if "packed" in packed:
        codes = from_tiles(packed["packed"], n, k)
        return CanonicalWeight({**packed, "packed": codes[:, 0::2] | codes[:, 1::2] << 4, "scale": scale})
    weight = packed["weight"]
    return CanonicalWeight({"weight": _bytes(weight)[:n, :k].contiguous().view(weight.dtype), "scale": scale})


def _rows(packed: Packed, spec: LinearSpec, ids: Tensor) -> CanonicalWeight:
    """Some rows of an integer weight."""
    if halved(spec):
        block = packed["qweight"][ids // ROWS, :, ids % ROWS]
        codes = torch.stack((block & 15, block >> 4), dim=2).flatten(1)[:, :spec.in_features]
        q = ((codes ^ 8).to(torch.int16) - 8).to(torch.int8)
    else:
        q = packed["qweight"][ids, :spec.in_features]
    tensors = {"qweight": q, "scale": plain_scale(packed["scale"])[:, ids].t()}
    if not spec.weight.symmetric:
        tensors["zero_point"] = packed["zero_point"][:, ids].t()
    return CanonicalWeight({name: tensor.contiguous() for name, tensor in tensors.items()})


def _even(packed: Packed, spec: LinearSpec) -> Packed:
    return {**packed, "scale": plain_scale(packed["scale"])} if "scale" in packed else packed


CUDA_TILES = Layout(name="cuda_tiles", names=names, pack=_pack, unpack=_unpack, rows=_rows, even=_even,
                    bits=lambda spec: 4 if halved(spec) else spec.weight.bits if spec.weight.type != "int" else 8)
