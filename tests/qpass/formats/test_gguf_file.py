"""GGUF files: what a sound one holds, and a named error in bounded time for every other."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qpass.errors import CheckpointError
from qpass.formats.gguf_file import Strings, read_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.gguf"
    writer: Any = gguf.GGUFWriter(path, "toy")
    writer.add_uint32("toy.block_count", 1)
    writer.add_float32("toy.epsilon", 1e-5)
    writer.add_bool("toy.flag", True)
    writer.add_string("toy.note", "ü")
    writer.add_array("toy.sections", [1, 2, 3])
    writer.add_token_list(["<a>", "b", "c"])
    writer.add_tensor("plain.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("half.weight", np.arange(6, dtype=np.float16).reshape(2, 3))
    blocks = gguf.quantize(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_sound_file(sound: Path) -> None:
    file = read_gguf(sound)
    assert file.metadata["general.architecture"] == "toy"
    assert file.metadata["toy.sections"] == [1, 2, 3] and file.metadata["toy.flag"] is True
    assert file.metadata["toy.note"] == "ü"
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Strings) and len(tokens) == 3 and list(tokens) == ["<a>", "b", "c"]
    assert torch.equal(file.read("plain.weight"), torch.arange(12.0).view(3, 4))
    assert torch.equal(file.read("half.weight"), torch.arange(6.0).half().view(2, 3))
    info = file.tensors["q.weight"]
    assert (info.kind, info.shape, tuple(file.read("q.weight").shape)) == ("Q8_0", (2, 64), (2, 68))


def test_every_truncation_is_an_error(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    file = read_gguf(sound)
    needed = max(info.start + info.nbytes for info in file.tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in range(needed):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_gguf(cut)


def test_every_byte_of_the_header_may_be_wrong(sound: Path, tmp_path: Path) -> None:
    whole = bytearray(sound.read_bytes())
    start = min(info.start for info in read_gguf(sound).tensors.values())
    draw = random.Random(0)
    flipped = tmp_path / "flipped.gguf"
    for at in range(start):
        for value in (0, 255, draw.randrange(256)):
            flipped.write_bytes(whole[:at] + bytes([value]) + whole[at + 1:])
            try:
                file = read_gguf(flipped)
            except CheckpointError as error:
                assert "flipped.gguf" in str(error)
                continue
            for name, info in file.tensors.items():
                assert file.read(name).numel() <= len(whole), info


@pytest.mark.parametrize(("header", "message"), [
    (b"GGML" + bytes(40), "does not begin with"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
    (b"GGUF" + struct.pack("<IQQ", 3, 10**12, 0), "truncated or damaged"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "truncated or damaged"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "needs 4611686018427387904 bytes"),
    (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**60), "k at byte"),
    (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60), "k at byte"),
    (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(64), "array of type 9"),
    (b"GGUF" + struct.pack("<IQQQ1sIQ1sII", 3, 0, 2, 1, b"k", 4, 1, b"k", 4, 7), "truncated|twice"),
    (b"GGUF" + struct.pack("<IQQQ1sI4QIQ", 3, 1, 0, 1, b"w", 4, 2**40, 2**40, 2**40, 2**40, 0, 0), "bytes in a file"),
    (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 0, 0, 0), "0 bytes in a file"),
    (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 33, 8, 0), "blocks of 32"),
    (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 4, 99, 0), "ggml type 99"),
    (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"w", 77) + bytes(999), "77 dimensions"),
    (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 4, 0, 7) + bytes(64), "not a multiple of 32"),
    (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 4, 0, 2**60) + bytes(64), "truncated"),
], ids=lambda value: value[:24] if isinstance(value, str) else "")
def test_what_makes_no_sense_is_named(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(header)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_tensors_may_not_share_bytes(tmp_path: Path) -> None:
    def entry(name: bytes, offset: int) -> bytes:
        return struct.pack("<Q1sIQIQ", 1, name, 1, 16, 0, offset)

    path = tmp_path / "overlap.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + entry(b"a", 0) + entry(b"b", 32) + bytes(256))
    with pytest.raises(CheckpointError, match="within the tensor before it"):
        read_gguf(path)


def test_a_file_that_changes_is_noticed(sound: Path) -> None:
    file = read_gguf(sound)
    sound.write_bytes(sound.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        file.read("plain.weight")
