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
    codes = (q.cpu().numpy() + np.int16(1 << bits - 1)).astype(np.uint8)
    words = -(-k * bits // 32)
    stream = np.zeros((n, words * 4), dtype=np.uint8)
    if bits == 8:
        stream[:, :k] = codes
    elif bits == 4:
        stream[:, : -(-k // 2)] = codes[:, 0::2]
        stream[:, : k // 2] |= codes[:, 1::2] << 4
    else:
        step = max(1, (1 << 22) // max(k * bits, 1))
        for row in range(0, n, step):
            block = codes[row:row + step]
            planes = (block[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
            packed = np.packbits(planes.reshape(len(block), -1), axis=1, bitorder="little")
            stream[row:row + step, : packed.shape[1]] = packed
    return torch.from_numpy(stream.view("<i4")).to(q.device)


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of pack_rows: int32 [N, words] -> int8 [N, k]. Raises ValueError if the row is too short or long."""
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != -(-k * bits // 32):
        raise ValueError(f"packed weight is {packed.dtype} {tuple(packed.shape)}; {k} values of {bits} bits need int32 "
                         f"rows of {-(-k * bits // 32)} words")
    stream = np.ascontiguousarray(packed.cpu().numpy()).view(np.uint8)
    if bits == 8:
        codes = stream[:, :k]
    elif bits == 4:
        codes = np.empty((len(stream), stream.shape[1] * 2), dtype=np.uint8)
        codes[:, 0::2] = stream & 15
        codes[:, 1::2] = stream >> 4
        codes = codes[:, :k]
    else:
        codes = np.empty((len(stream), k), dtype=np.uint8)
        weights = (1 << np.arange(bits)).astype(np.uint8)
        step = max(1, (1 << 22) // max(k * bits, 1))
        for row in range(0, len(stream), step):
            planes = np.unpackbits(stream[row:row + step], axis=1, count=k * bits, bitorder="little")
            codes[row:row + step] = (planes.reshape(-1, k, bits) * weights).sum(-1, dtype=np.uint8)
    q = (codes.astype(np.int16) - (1 << bits - 1)).astype(np.int8)
    return torch.from_numpy(q).to(packed.device)


def unpack_loose(packed: Tensor, bits: int, k: int) -> Tensor:
    """int32 [N, ceil(k / (32 // bits))] to int8 [N, k], where no value straddles words: the top bits are not used."""
    per_word = 32 // bits
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != -(-k // per_word):
        raise ValueError(f"packed weight is {packed.dtype} {tuple(packed.shape)}; {k} values of {bits} bits, "
                         f"{per_word} a word, need int32 rows of {-(-k // per_word)} words")
    shifts = torch.arange(per_word, dtype=torch.int32, device=packed.device) * bits
    codes = ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :k]
    return (codes - (1 << bits - 1)).to(torch.int8)
