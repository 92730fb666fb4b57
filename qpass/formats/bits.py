"""Bits: small signed integers in, dense little-endian 32-bit words out, and back (compressed-tensors' packing).

Element i of a row stands at bit i * bits of the row's stream, as q + 2^(bits - 1); a row is padded to whole words.
For 2, 4 and 8 bits this is the same as packing each word alone; for 3, 5, 6 and 7 values straddle words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def pack_rows(q: Tensor, bits: int) -> Tensor:
    """q int8 [N, K] in [-2^(bits-1), 2^(bits-1)) -> int32 [N, ceil(K * bits / 32)]."""
    n, k = q.shape
    words = -(-k * bits // 32)
    codes = q.contiguous().view(torch.uint8) + (1 << bits - 1)
    if bits in (4, 8):
        if k * bits < words * 32:
            codes = torch.nn.functional.pad(codes, (0, words * 32 // bits - k))
        stream = codes.flatten() if bits == 8 else _as_nibbles(codes.flatten())
        return stream.view(torch.int32).view(n, words)
    given = codes.cpu().numpy()
    found = np.zeros((n, words * 4), dtype=np.uint8)
    step = max(1, (1 << 22) // max(k * bits, 1))
    for row in range(0, n, step):
        block = given[row:row + step]
        planes = (block[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
        packed = np.packbits(planes.reshape(len(block), -1), axis=1, bitorder="little")
        found[row:row + step, : packed.shape[1]] = packed
    return torch.from_numpy(found.view("<i4")).to(q.device)


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of pack_rows: int32 [N, words] -> int8 [N, k]. Raises ValueError if the row is too short or long."""
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != -(-k * bits // 32):
        raise ValueError(f"packed weight is {packed.dtype} {tuple(packed.shape)}; {k} values of {bits} bits need int32 "
                         f"rows of {-(-k * bits // 32)} words")
    if bits in (4, 8):
        stream = packed.flatten().view(torch.uint8)
        whole = stream.clone() if bits == 8 else _from_nibbles(stream)
        codes = whole.view(len(packed), packed.shape[1] * 32 // bits)[:, :k].contiguous()
    else:
        given = np.ascontiguousarray(packed.cpu().numpy()).view(np.uint8)
        found = np.empty((len(given), k), dtype=np.uint8)
        weights = (1 << np.arange(bits)).astype(np.uint8)
        step = max(1, (1 << 22) // max(k * bits, 1))
        for row in range(0, len(given), step):
            planes = np.unpackbits(given[row:row + step], axis=1, count=k * bits, bitorder="little")
            found[row:row + step] = (planes.reshape(-1, k, bits) * weights).sum(-1, dtype=np.uint8)
        codes = torch.from_numpy(found).to(packed.device)
    return codes.sub_(1 << bits - 1).view(torch.int8)


_AT_ONCE = 1 << 18
"""Bytes whose nibbles are moved at a time: what is between two steps stays in the cache."""


def _from_nibbles(stream: Tensor) -> Tensor:
    """uint8 [W] -> uint8 [2 W], the lower four bits of each byte first."""
    found = torch.empty(len(stream), dtype=torch.int16, device=stream.device)
    for part, into in zip(stream.split(_AT_ONCE), found.split(_AT_ONCE), strict=True):
        pairs = part.to(torch.int16)
        pairs |= pairs << 4
        torch.bitwise_and(pairs, 0x0F0F, out=into)
    return found.view(torch.uint8)


def _as_nibbles(codes: Tensor) -> Tensor:
    """The inverse of _from_nibbles; codes of at most four bits."""
    pairs = codes.view(torch.int16)
    found = torch.empty(len(pairs), dtype=torch.uint8, device=codes.device)
    for part, into in zip(pairs.split(_AT_ONCE), found.split(_AT_ONCE), strict=True):
        into.copy_((part | part >> 4) & 0xFF)
    return found


def unpack_loose(packed: Tensor, bits: int, k: int) -> Tensor:
    """int32 [N, ceil(k / (32 // bits))] to int8 [N, k], where no value straddles words: the top bits are not used."""
    per_word = 32 // bits
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != -(-k // per_word):
        raise ValueError(f"packed weight is {packed.dtype} {tuple(packed.shape)}; {k} values of {bits} bits, "
                         f"{per_word} a word, need int32 rows of {-(-k // per_word)} words")
    shifts = torch.arange(per_word, dtype=torch.int32, device=packed.device) * bits
    step = max(1, _AT_ONCE // max(packed.shape[1], 1))
    return torch.cat([((rows.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :k].sub_(1 << bits - 1)
                      .to(torch.int8) for rows in packed.split(step)])
