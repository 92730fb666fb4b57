"""GGUF file: the metadata and the tensor table of a llama.cpp file, every count and offset checked against the file.

Source: ggml's docs/gguf.md, versions 2 and 3, little-endian. Nothing is allocated on the word of the file: a string, an
array or a tensor must lie within it first. Tensors are read one at a time into memory of their own.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qpass.dtype import DType, torch_dtype
from qpass.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
# number in the file -> struct format
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# number in `enum ggml_type` -> (name, weights in a block, bytes in a block)
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}
PLAIN: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8",
                           "I16": "int16", "I32": "int32", "I64": "int64"}
_MOST_DIMS = 4
_LARGEST_ALIGNMENT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor: its type's name, its shape with the fastest dimension last, and where its bytes are in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the fastest dimension."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return self.nbytes // count


@dataclass(frozen=True, kw_only=True)
class Strings:
    """An array of strings, decoded only when asked for: vocabularies have hundreds of thousands."""

    file: Path
    start: int
    stop: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        with open(self.file, "rb") as opened:
            opened.seek(self.start)
            raw = opened.read(self.stop - self.start)
        at = 0
        for _ in range(self.count):
            size, = struct.unpack_from("<Q", raw, at)
            yield raw[at + 8:at + 8 + size].decode("utf-8", errors="replace")
            at += 8 + size


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A file as read: key -> number, bool, string, list of numbers or Strings; and name -> TensorInfo, in its order."""

    path: Path
    version: tuple[int, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    spans: Mapping[str, tuple[int, int]]  # key -> where its name, type and value stand
    holders: Mapping[str, GgufFile] = field(default_factory=dict)  # tensor -> its file, where that is not this one

    def holder(self, name: str) -> GgufFile:
        """The file in which a tensor stands: this one, or another part of the same model."""
        return self.holders.get(name, self)

    def raw_metadata(self, keys: Iterable[str]) -> bytes:
        """Those keys and their values as the file has them, one after the other."""
        with open(self.path, "rb") as file:
            found = b""
            for key in keys:
                start, stop = self.spans[key]
                file.seek(start)
                found += file.read(stop - start)
        return found

    def read(self, name: str, at: int | None = None) -> Tensor:
        """A tensor in memory of its own: typed if its type is plain, else the blocks' bytes, uint8 [..., row bytes];
        with `at`, what stands there in its first dimension.

        Raises CheckpointError if the file changed since its header was read.
        """
        if (holder := self.holder(name)) is not self:
            return holder.read(name, at)
        info = self.tensors[name]
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if at is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
            start += at * nbytes
        raw = np.empty(nbytes, dtype=np.uint8)
        try:
            with open(self.path, "rb") as file:
                if _version(file.fileno()) != self.version:
                    raise CheckpointError(f"{self.path} changed while it was being read; load it again")
                file.seek(start)
                if file.readinto(raw.data) != nbytes:
                    raise CheckpointError(f"{self.path} ends within {name}")
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error
        flat = torch.from_numpy(raw)
        if (dtype := PLAIN.get(info.kind)) is not None:
            return flat.view(torch_dtype(dtype)).view(shape)
        return flat.view(*shape[:-1], -1)


def read_gguf(path: Path) -> GgufFile:
    """The header of `path`. Raises CheckpointError, saying where, for whatever is not a sound GGUF file."""
    try:
        with open(path, "rb") as file:
            version = _version(file.fileno())
            if version[2] < 24:
                raise CheckpointError(f"{path} has {version[2]} bytes, which is no GGUF file")
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                cursor = _Cursor(path, data)
                metadata, tensors = cursor.parse()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return GgufFile(path=path, version=version, metadata=metadata, tensors=tensors, spans=cursor.spans)


def _version(descriptor: int) -> tuple[int, ...]:
    seen = os.fstat(descriptor)
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


class _Cursor:
    def __init__(self, path: Path, data: mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0
        self.spans: dict[str, tuple[int, int]] = {}

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self.data[:4] != MAGIC:
            raise CheckpointError(f"{self.path} does not begin with {MAGIC!r}: it is no GGUF file")
        self.at = 4
        version, = self.take("I")
        if version not in (2, 3):
            turned = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "is big-endian" if turned in (2, 3) else f"has GGUF version {version}"
            raise CheckpointError(f"{self.path} {why}; little-endian files of version 2 and 3 are read")
        tensor_count, key_count = self.take("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            start = self.at
            key = self.string("a key")
            kind, = self.take("I")
            if key in metadata:
                raise CheckpointError(f"{self.path} has the key {key!r} twice")
            metadata[key] = self.value(kind, key)
            self.spans[key] = start, self.at
        table = dict(self.entries(tensor_count))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & alignment - 1:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, and must be a power of two")
        return metadata, self.place(table, -(-self.at // alignment) * alignment, alignment)

    def entries(self, count: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
        """name -> (type, shape, offset, bytes), bytes checked against the file."""
        seen: set[str] = set()
        for _ in range(count):
            name = self.string("a tensor's name")
            dims, = self.take("I")
            if name in seen or not 1 <= dims <= _MOST_DIMS:
                raise CheckpointError(f"{self.path}: {name!r} " + (
                    "is there twice" if name in seen else f"has {dims} dimensions; 1 to {_MOST_DIMS} are possible"))
            seen.add(name)
            shape = tuple(reversed(self.take(f"{dims}Q")))
            number, offset = self.take("IQ")
            if number not in TYPES:
                raise CheckpointError(f"{self.path}: {name} is of ggml type {number}, which this version does not know")
            kind, block, block_bytes = TYPES[number]
            nbytes = block_bytes
            for size in (*shape[:-1], shape[-1] // block):
                nbytes *= size
            if not nbytes or shape[-1] % block or nbytes > self.size:
                raise CheckpointError(f"{self.path}: {name} is {kind} {list(shape)}: " + (
                    f"{nbytes} bytes in a file of {self.size}" if shape[-1] % block == 0 else
                    f"its rows are not made of blocks of {block}"))
            yield name, (kind, shape, offset, nbytes)

    def place(self, table: Mapping[str, tuple[str, tuple[int, ...], int, int]], start: int,
              alignment: int) -> dict[str, TensorInfo]:
        found, end = {}, 0
        for name, (kind, shape, offset, nbytes) in sorted(table.items(), key=lambda item: item[1][2]):
            if offset % alignment or offset < end or start + offset + nbytes > self.size:
                why = (f"is not a multiple of {alignment}" if offset % alignment else
                       "is within the tensor before it" if offset < end else
                       f"leaves {self.size - start - offset} bytes of the {nbytes} it needs; the file is truncated")
                raise CheckpointError(f"{self.path}: the offset {offset} of {name} {why}")
            end = offset + nbytes
            found[name] = TensorInfo(kind=kind, shape=shape, start=start + offset, nbytes=nbytes)
        return {name: found[name] for name in table}

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + layout)
        self.need(size, "its header")
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += size
        return values

    def need(self, size: int, what: str) -> None:
        if size > self.size - self.at:
            raise CheckpointError(f"{self.path} is truncated or damaged: {what} at byte {self.at} needs {size} bytes, "
                                  f"and {self.size - self.at} are left")

    def string(self, what: str) -> str:
        size, = self.take("Q")
        self.need(size, what)
        raw = self.data[self.at:self.at + size]
        self.at += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} at byte {self.at - size} is not UTF-8: {error}") from error

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: {key} has a value of unknown type {kind}")
        element, count = self.take("IQ")
        if element in SCALARS:
            self.need(count * struct.calcsize("<" + SCALARS[element]), key)
            return list(self.take(f"{count}{SCALARS[element]}"))
        if element != STRING:
            raise CheckpointError(f"{self.path}: {key} is an array of type {element}, which this version cannot read")
        self.need(8 * count, key)
        start, at, data, size = self.at, self.at, self.data, self.size
        for _ in range(count):
            if at + 8 > size:
                self.need(size, key)
            at += 8 + int.from_bytes(data[at:at + 8], "little")
            if at > size:
                raise CheckpointError(f"{self.path} is truncated or damaged: {key} runs past its end")
        self.at = at
        return Strings(file=self.path, start=start, stop=at, count=count)
