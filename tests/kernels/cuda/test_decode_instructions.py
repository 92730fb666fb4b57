"""The instructions that unpack 4-bit integers, which Triton's interpreter cannot run, give the right numbers.

Each line of the assembly is carried out here, in NumPy, for every byte in every place of a word.
"""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
_HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def run_assembly(text: str, outputs: int, word: np.ndarray) -> list[np.ndarray]:
    """What the outputs $0, $1, ... hold after the lines of `text`, given the input words uint32."""
    registers = {f"${outputs}": word}

    def value(name: str) -> np.ndarray:
        name = name.strip()
        if name[0].isdigit():
            return np.full_like(word, int(name, 0))
        return registers[name]

    def halves(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(words.view(np.int16).copy()).view(dtype).double()

    for line in (part.strip() for part in text.strip().strip("{}").split(";")):
        if not line or line.startswith(".reg"):
            continue
        op, rest = line.split(None, 1)
        target, *sources = (part.strip() for part in rest.split(","))
        given = [value(source) for source in sources]
        if op == "mov.b32":
            made = given[0]
        elif op in ("shr.u32", "shl.b32"):
            made = given[0] >> given[1] if op == "shr.u32" else given[0] << given[1]
        elif op == "and.b32":
            made = given[0] & given[1]
        elif op == "prmt.b32":
            made = np.zeros_like(word)
            both = given[0].astype(np.uint64) | given[1].astype(np.uint64) << 32
            for i in range(4):
                chosen = (int(given[2].flat[0]) >> 4 * i) & 7
                made |= ((both >> 8 * chosen) & 255).astype(np.uint32) << np.uint32(8 * i)
        elif op == "lop3.b32":
            table, made = int(given[3].flat[0]), np.zeros_like(word)
            for bit in range(8):
                if table >> bit & 1:
                    a, b, c = ((x if bit >> place & 1 else ~x) for x, place in zip(given, (2, 1, 0), strict=False))
                    made |= a & b & c
        elif match := re.fullmatch(r"(fma\.rn|sub)\.(bf16x2|f16x2)", op):
            dtype = _HALVES[match[2]]
            parts = [halves(g, dtype) for g in given]
            y = parts[0] * parts[1] + parts[2] if match[1] == "fma.rn" else parts[0] - parts[1]
            made = y.to(dtype).view(torch.int16).numpy().view(np.uint32)
        else:
            raise AssertionError(f"unknown instruction: {line}")
        registers[target] = made
    return [registers[f"${i}"] for i in range(outputs)]


def every_byte() -> tuple[np.ndarray, np.ndarray]:
    """Words with each byte value in each place, beside others, and their bytes int [words, 4]."""
    places = np.stack([(np.arange(256) * m + a) % 256 for m, a in ((1, 0), (7, 3), (11, 90), (29, 201))], axis=1)
    return places.astype(np.uint8).reshape(-1).view(np.uint32), places


def signed(nibbles: np.ndarray) -> np.ndarray:
    return (nibbles ^ 8) - 8


@pytest.mark.parametrize(("name", "dtype"), [("INT4_TO_BF16", torch.bfloat16), ("INT4_TO_FP16", torch.float16)])
def test_to_floats_of_16_bits(name: str, dtype: torch.dtype) -> None:
    from qpass.kernels.cuda.programs import decode

    words, places = every_byte()
    out = run_assembly(getattr(decode, name).value, 4, words)
    got = [torch.from_numpy(o.view(np.int16).copy()).view(dtype).double().view(-1, 2).numpy() for o in out]
    assert np.array_equal(np.concatenate(got[:2], axis=1), signed(places & 15))
    assert np.array_equal(np.concatenate(got[2:], axis=1), signed(places >> 4))


def test_to_bytes_16_times_too_large() -> None:
    from qpass.kernels.cuda.programs import decode

    words, places = every_byte()
    low, high = run_assembly(decode.INT4_TO_INT8.value, 2, words)
    assert np.array_equal(low.view(np.int8).reshape(-1, 4), 16 * signed(places & 15))
    assert np.array_equal(high.view(np.int8).reshape(-1, 4), 16 * signed(places >> 4))
