"""Integer variants by definition: every width, zero points, activation order and re-planning, packed bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qpass
from tests.qpass.formats.test_variants import LAYER, K, N, same, write

G = 32
GROUPS = K // G


def stream(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, k], each row one stream of bits, lowest first, in int32 words; words may be straddled."""
    planes = (codes.numpy().astype(np.uint8)[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little").view("<i4").copy())


def numbers(bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zero points [N, GROUPS] with every value from 0 on, float16 scales [N, GROUPS]."""
    draw = torch.Generator().manual_seed(seed)
    zeros = torch.arange(N * GROUPS).reshape(GROUPS, N).t() % (1 << bits)
    return (torch.randint(0, 1 << bits, (N, K), generator=draw), zeros,
            ((torch.rand(N, GROUPS, generator=draw) + 0.5) * 0.02).half())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_of_every_width(bits: int, version: int, tmp_path: Path) -> None:
    """Zero points of 0 among them: version 1 borrows one from a word as a whole, except for 3 bits."""
    q, zeros, scale = numbers(bits)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1)) if version == 2 else torch.arange(K)
    g_idx = torch.empty(K, dtype=torch.int32)
    g_idx[order] = (torch.arange(K) // G).int()
    stored = zeros.t().contiguous()
    if version == 1 and bits == 3:
        stored = (stored - 1) % 8
    words = stream(stored, bits)
    if version == 1 and bits != 3:
        ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
        words = ((words.long() - ones) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
    layer = {"qweight": stream(q, bits).t(), "qzeros": words, "scales": scale.t(), "g_idx": g_idx}
    decoded = (q - zeros[:, g_idx.long()]) * scale.float()[:, g_idx.long()]
    model = write(tmp_path, {"quant_method": "gptq", "bits": bits, "group_size": G, "sym": False,
                             "desc_act": version == 2, "meta": {"quantizer": ["gptqmodel:7.7.0"]},
                             "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, layer, decoded)
    same(qpass.load(tmp_path), model)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["group, zero points", "group, g_idx", "channel"])
def test_compressed_tensors_of_every_width(bits: int, kind: str, tmp_path: Path) -> None:
    q, zeros, scale = numbers(bits)
    if kind == "channel":
        scale, zeros, g_idx = scale[:, :1], torch.full((N, 1), 1 << bits - 1), torch.zeros(K, dtype=torch.int32)
    else:
        g_idx = (torch.arange(K) // G).int()
        g_idx = g_idx[torch.randperm(K, generator=torch.Generator().manual_seed(2))] if "g_idx" in kind else g_idx
    zeros = zeros if "zero" in kind else torch.full_like(zeros, 1 << bits - 1)
    layer = {"weight_packed": stream(q, bits), "weight_scale": scale, "weight_shape": torch.tensor([N, K])}
    if "zero" in kind:
        layer["weight_zero_point"] = stream(zeros.t().contiguous(), bits).t()
    if "g_idx" in kind:
        layer["weight_g_idx"] = g_idx
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": "zero" not in kind, "dynamic": False,
                               "strategy": kind.partition(",")[0], "group_size": None if kind == "channel" else G,
                               "actorder": "group" if "g_idx" in kind else None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
              "config_groups": {"group_0": {"targets": [r"re:.*layers\.\d+\.mlp\.gate_.*"], "weights": weights,
                                            "input_activations": None, "output_activations": None}},
              "ignore": ["lm_head"]}
    decoded = (q - zeros[:, g_idx.long()]) * scale.float()[:, g_idx.long()]
    model = write(tmp_path, config, layer, decoded)
    same(qpass.load(tmp_path), model)


@pytest.mark.parametrize("recipe", ["w4a8", "w4a16"])
def test_zero_points_in_the_middle_are_none(recipe: str, tmp_path: Path) -> None:
    """Re-planned, a symmetric checkpoint and an asymmetric one with every zero point 8 give equal results."""
    q, _, scale = numbers(4)
    zeros = torch.full((N, GROUPS), 8)
    logits = []
    for name, sym in (("symmetric", True), ("asymmetric", False)):
        layer = {"qweight": stream(q, 4).t(), "qzeros": stream(zeros.t().contiguous(), 4), "scales": scale.t()}
        folder = tmp_path / name
        folder.mkdir()
        write(folder, {"quant_method": "gptq", "bits": 4, "group_size": G, "sym": sym, "desc_act": False,
                       "checkpoint_format": "gptq_v2"}, layer, (q - 8) * scale.float().repeat_interleave(G, 1))
        loaded: Any = qpass.load(folder, recipe)
        assert loaded.get_submodule(LAYER).spec.family == recipe
        with torch.inference_mode():
            logits.append(loaded(torch.arange(2, 12)[None]).logits)
    assert torch.equal(*logits)
