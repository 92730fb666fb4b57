"""Packing: every width and odd length there and back, the stated layout, and compressed-tensors' own."""

from __future__ import annotations

import pytest
import torch

from qpass.formats.bits import pack_rows, unpack_rows


def codes(bits: int, n: int, k: int) -> torch.Tensor:
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k), dtype=torch.int8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [1, 7, 31, 32, 33, 97, 128])
def test_round_trip(bits: int, k: int) -> None:
    q = codes(bits, 5, k)
    packed = pack_rows(q, bits)
    assert packed.dtype == torch.int32 and tuple(packed.shape) == (5, -(-k * bits // 32))
    assert torch.equal(unpack_rows(packed, bits, k), q)


@pytest.mark.parametrize("bits", range(1, 9))
def test_element_i_stands_at_bit_i_times_bits(bits: int) -> None:
    q = codes(bits, 1, 41)
    stream = sum((int(v) + (1 << bits - 1)) << i * bits for i, v in enumerate(q[0]))
    words = [int(w) & 0xFFFFFFFF for w in pack_rows(q, bits)[0]]
    assert words == [stream >> 32 * i & 0xFFFFFFFF for i in range(len(words))]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [64, 96, 33])
def test_same_as_compressed_tensors(bits: int, k: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers",
                                  reason="compressed-tensors is not installed")
    q = codes(bits, 6, k)
    packed = pack_rows(q, bits)
    assert torch.equal(packed, helpers.pack_to_int32(q, bits))
    assert torch.equal(helpers.unpack_from_int32(packed, bits, torch.Size((6, k))), q)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 24), (24, 1), (6, 8)])
def test_turned_matrices(bits: int, shape: tuple[int, int]) -> None:
    """Strides of a dimension of one element may be anything."""
    q = codes(bits, *shape)
    turned = q.t().contiguous().t()
    packed = pack_rows(turned, bits)
    assert torch.equal(packed, pack_rows(q, bits))
    assert torch.equal(unpack_rows(packed.t().contiguous().t(), bits, shape[1]), q)
    row = torch.empty_strided(shape, (1, 1) if 1 in shape else (shape[1], 1), dtype=torch.int8).copy_(q)
    assert torch.equal(unpack_rows(pack_rows(row, bits), bits, shape[1]), q)


def test_empty_and_wrong_sizes() -> None:
    assert unpack_rows(pack_rows(codes(4, 0, 8), 4), 4, 8).shape == (0, 8)
    packed = pack_rows(codes(4, 2, 16), 4)
    for wrong in (packed[:, :1], packed.long(), packed[0]):
        with pytest.raises(ValueError, match="16 values of 4 bits need int32 rows of 2 words"):
            unpack_rows(wrong, 4, 16)
