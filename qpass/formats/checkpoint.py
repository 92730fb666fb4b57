"""Checkpoint: a folder or a file that somebody gave, in; its config and the facts of its tensors, lazily read, out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qpass.dtype import DType, dtype_name, itemsize
from qpass.errors import CheckpointError, QPassError

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_JSON = 64 << 20  # bytes; a tokenizer's file has some 20 MB, a config some KB


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a checkpoint: in which file, from which byte on if that is known, and what it is.

    `version` tells a file from one that replaced it.
    """

    file: Path
    dtype: DType
    shape: tuple[int, ...]
    version: tuple[int, ...] = ()
    start: int = 0

    @property
    def nbytes(self) -> int:
        count = itemsize(self.dtype)
        for size in self.shape:
            count *= size
        return count

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Source(Protocol):
    """The tensors of a checkpoint: facts of all, which cost a header, and the numbers of those that are asked for.

    `metadata` is what the file says beside its tensors. `read` gives copies: nothing refers to the file afterwards;
    with `at`, of each tensor only what stands there in its first dimension. Both raise CheckpointError, naming the
    file.
    """

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Any]

    def read(self, names: Iterable[str], at: int | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a format gets to see.

    path          the folder, or the file if the format is one file
    config        config.json; empty if there is none
    quantization  what config.json says of quantization; empty if nothing
    source        the tensors
    """

    path: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    source: Source
    asked: set[str] = field(default_factory=set)

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return self.source.tensors

    def need(self, name: str, *, of: str, shape: tuple[int, ...] | None = None,
             dtype: DType | torch.dtype | tuple[DType | torch.dtype, ...] | None = None) -> str:
        """`name`, once it is known that the tensor is there and what it must be; `of` says what needs it.

        Raises CheckpointError that names both sides otherwise.
        """
        there = self.tensors.get(name)
        if there is None:
            path = name.rpartition(".")[0]
            beside = sorted(n for n in self.tensors if n.startswith(path + "."))
            raise CheckpointError(f"{self.path}: {of} needs {name}; the files have "
                                  f"{', '.join(beside[:6]) or 'nothing of that layer'}")
        wanted = () if dtype is None else [dtype_name(one) for one in (dtype if isinstance(dtype, tuple) else (dtype,))]
        if (wanted and there.dtype not in wanted) or (shape is not None and there.shape != shape):
            kinds = " or ".join(wanted) if wanted else ""
            raise CheckpointError(f"{name} in {there.file} is {there.dtype} {list(there.shape)}; {of} needs "
                                  f"{kinds}{' ' if kinds and shape is not None else ''}"
                                  f"{'' if shape is None else list(shape)}")
        return name

    def raw(self, name: str) -> bytes:
        """The bytes of a little tensor that is a setting, without torch where it is known at which place they stand.

        Raises CheckpointError if they cannot be read.
        """
        if not (stored := self.tensors[name]).start:
            return bytes(self.source.read([name])[name].reshape(-1).view(torch.uint8).tolist())
        found = bytearray(stored.nbytes)
        read_into(memoryview(found), stored, stored.start)
        return bytes(found)

    def side(self, name: str) -> dict[str, Any]:
        """A JSON file beside the tensors; empty if there is none. Raises CheckpointError if it cannot be read."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return read_json(folder / name) if (folder / name).is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError, naming the file; a key said twice is an error."""
    check_inside(file)  # a pipe would never end
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, which no config has; it was not read")
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=no_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {type(found).__name__}, not the fields of a config")
    return found


def read_into(memory: memoryview, stored: Stored, start: int) -> None:
    """Fill `memory` with what stands in the tensor's file from byte `start` on.

    Raises CheckpointError, naming the file, if it changed since its header was read, or cannot be read.
    """
    try:
        with open(stored.file, "rb", buffering=0) as file:
            if file_version(file.fileno()) != stored.version:
                raise CheckpointError(f"{stored.file} changed while it was being read; load the folder again")
            file.seek(start)
            while memory:  # a single read gives 2 GB at most
                count = file.readinto(memory)
                if not count:
                    raise OSError("the file ends within a tensor")
                memory = memory[count:]
    except OSError as error:
        raise CheckpointError(f"cannot read {stored.file}: {error}") from error


def file_version(file: Path | int) -> tuple[int, ...]:
    """What tells a file (or an open one) from one that replaced it, or that was written to since."""
    seen = os.stat(file)
    return (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)


def check_inside(file: Path) -> None:
    """Raise CheckpointError if `file` is no ordinary file, or a link that leads out of its folder.

    The cache of Hugging Face keeps what its folders hold beside them, `snapshots/<revision>/` in `blobs/`; that is in.
    """
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is no ordinary file")
    if not file.is_symlink():
        return
    folder, real = file.parent.resolve(), file.resolve()
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if folder not in real.parents and cache not in real.parents:
        raise CheckpointError(f"{file} is a link to {real}, out of its folder; put the file itself there")


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Within, whatever a config or a header of a stranger's makes Python raise becomes CheckpointError, naming `path`.

    Formats say themselves what they find wrong; this is for what nobody thought of.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error) as error:
        if isinstance(error, QPassError):
            raise
        raise CheckpointError(f"{path}: its config or its headers are not what this format has: "
                              f"{type(error).__name__}: {error}") from error


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: the object of these pairs. Raises ValueError if a key stands there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found
