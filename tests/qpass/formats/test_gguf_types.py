"""GGUF types: random blocks of every type decode to what gguf-py decodes them to, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qpass.formats.gguf_file import PLAIN, TYPES
from qpass.formats.gguf_types import args_of, unpack_blocks
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight

gguf = pytest.importorskip("gguf")
KINDS = [name for name, _, _ in TYPES.values() if name not in PLAIN]
_HALVES = {  # where float16 scales stand in a block, so that random ones can be made finite
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}


def random_blocks(kind: str, n: int, per_row: int) -> torch.Tensor:
    _, nbytes = next((b, size) for name, b, size in TYPES.values() if name == kind)
    raw = np.random.default_rng(0).integers(0, 256, (n, per_row, nbytes), dtype=np.uint8)
    for at in _HALVES.get(kind, () if kind in ("MXFP4", "NVFP4", "IQ1_M") else (0,)):
        raw[..., at:at + 2] = np.random.default_rng(1).normal(size=(n, per_row, 1)).astype(np.float16).view(np.uint8)
    if kind == "IQ1_M":  # its scale is spread over the top nibbles of the last eight bytes
        raw[..., 55] = raw[..., 55] & 0x0F | 0x30
    if kind == "MXFP4":
        raw[..., 0] = np.clip(raw[..., 0], 0, 250)
    return torch.from_numpy(raw.reshape(n, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_equals_ggufs_own(kind: str) -> None:
    raw = random_blocks(kind, 5, 3)
    block = next(b for name, b, _ in TYPES.values() if name == kind)
    spec = LinearSpec(family="test", weight=args_of(kind), activation=None, out_features=5, in_features=3 * block)
    decoded = dequantize_weight(CanonicalWeight(unpack_blocks(raw, kind)), spec)
    expected = torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))
    assert expected.isfinite().all()
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "MXFP4"])
def test_scales_that_are_no_numbers_are_refused(kind: str) -> None:
    raw = torch.full((2, 2 * next(size for name, _, size in TYPES.values() if name == kind)), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=kind):
        unpack_blocks(raw, kind)


def test_mxfp4_at_the_ends_of_its_range() -> None:
    raw = random_blocks("MXFP4", 1, 255)
    raw[0].view(255, 17)[:, 0] = torch.arange(255)
    spec = LinearSpec(family="t", weight=args_of("MXFP4"), activation=None, out_features=1, in_features=255 * 32)
    decoded = dequantize_weight(CanonicalWeight(unpack_blocks(raw, "MXFP4")), spec)
    expected = torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType.MXFP4))
    assert torch.equal(decoded[0, :254 * 32], expected[0, :254 * 32])
