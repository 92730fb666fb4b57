"""What bitsandbytes itself makes of some weights: run where it is installed, this writes the file for the tests.

    python tests/qpass/codecs/bitsandbytes_numbers.py    # bitsandbytes 0.50.2, torch 2.13, on a CPU
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).resolve().parents[2] / "fixtures" / "bitsandbytes" / "numbers.safetensors"
KINDS, BLOCKS = ("nf4", "fp4"), (32, 64)
WIDTH = 104  # neither whole blocks nor whole vectors: rows of whole vectors its AVX512 kernel decodes wrongly then


def weights(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, new ones at each call; `tables` are the values of each kind's codes."""
    found = {"normal": torch.randn(16, WIDTH) * torch.logspace(-3, 3, 16)[:, None],
             "short": (torch.randn(16, 64) / 10).bfloat16(), "half": (torch.randn(16, WIDTH) / 10).half(),
             "odd": torch.randn(7, 33), "odd bfloat16": torch.randn(7, 33).bfloat16(), "edges": edges()}
    return found | {f"ties of {kind}": ties(table) for kind, table in tables.items()}


def edges() -> Tensor:
    """Zeros, groups of zeros, subnormals, and what is nearly too large, in rows and in groups of a row."""
    weight = torch.randn(16, WIDTH)
    weight[0], weight[1], weight[2], weight[3] = 0, -0.0, weight[2] * 1e-38, weight[3] * 1e-42
    weight[4, :64], weight[5], weight[6, 1:], weight[7] = 0, 1e-45, 0, weight[7] * 5e35
    weight[8, :32], weight[8, 2:32:3] = 3.2e38, -1.7e38  # one block, as double quantization adds up all their scales
    weight[9], weight[10] = 2.0 ** torch.arange(-149, WIDTH - 149), -(2.0 ** torch.arange(WIDTH))
    weight[11] = 2.9e-39
    return weight


def ties(table: Tensor) -> Tensor:
    """The middles between a table's values, what is next to them, and the values, times many scales."""
    ordered = table.sort().values
    middle = (ordered[1:] + ordered[:-1]) / 2
    row = torch.cat([middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0)),
                     ordered, torch.zeros(WIDTH - 61)])
    row[::32] = 1
    return row * torch.cat([2.0 ** torch.arange(-4, 4), torch.rand(8) * 10])[:, None]


def theirs(weight: Tensor, kind: str, block: int) -> dict[str, Tensor]:
    """`packed`, `absmax` and `decoded` (float32) of bitsandbytes; and with double quantization, what a checkpoint has
    of it (`nested.*`) and the scales that come out (`nested`)."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind)
    state.dtype = torch.float32
    found = {"packed": packed.reshape(-1), "absmax": state.absmax, "code": state.code,
             "decoded": functional.dequantize_4bit(packed, state)}
    _, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=True)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    stored = {f"nested.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {**found, **stored, "nested": scales}


def values() -> dict[str, Tensor]:
    """The values of bitsandbytes' codes."""
    from bitsandbytes import functional

    return {kind: functional.get_4bit_type(kind, device="cpu") for kind in KINDS}


if __name__ == "__main__":
    from safetensors.torch import save_file

    torch.manual_seed(50)
    tensors: dict[str, Tensor] = {}
    for name, weight in weights(values()).items():
        tensors[f"{name}/weight"] = weight
        for kind in KINDS:
            for block in BLOCKS:
                made = theirs(weight, kind, block)
                tensors |= {f"{name}/{kind}/{block}/{key}": tensor.contiguous() for key, tensor in made.items()}
    save_file(tensors, FILE)
