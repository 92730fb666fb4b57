"""safetensors: named tensors, made one at a time, to one file; and a folder's files to the facts of each tensor.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes without gaps. Writing it here rather than
with the safetensors package keeps one tensor in memory instead of all; reading is left to that package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpass.dtype import DType, dtype_name, torch_dtype
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Stored, check_inside, file_version, no_doubles, read_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES: dict[DType, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "uint16": "U16", "uint32": "U32",
    "uint64": "U64", "complex64": "C64", "float8_e8m0fnu": "F8_E8M0",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BYTES: dict[int, DType] = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor to be written: what it will be, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def write_file(path: Path, entries: list[Entry]) -> None:
    """Write `entries` to `path` and flush them to the disk; raises OSError as the file system does."""
    ordered = sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))  # so that every tensor starts aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        header[entry.name] = {"dtype": _NAMES[dtype_name(entry.dtype)], "shape": list(entry.shape),
                              "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = entry.make()
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise CheckpointError(f"{entry.name} changed while it was being saved: it was {entry.dtype} "
                                      f"{entry.shape} "
                                      f"and is {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.numel():
                raw = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(raw.view(torch_dtype(_BYTES[raw.element_size()])).numpy().data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def split_shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """The entries in order, cut into shards of at most `limit` bytes (one tensor may be more)."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def is_transformers_folder(folder: Path) -> bool:
    """Whether safetensors weights stand there under the names that Transformers gives them."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def weights_file(folder: Path) -> Path | None:
    """The safetensors file of a folder, or the index of several: under Transformers' name, or the only one there is,
    for older tools named files after the quantization. None if there is none, or several that nothing tells apart."""
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        if found := [file for file in folder.glob(pattern) if file.is_file()]:
            return found[0] if len(found) == 1 else None
    return None


def read_folder(folder: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Name -> where and what, of every tensor in the folder's safetensors files, and what their headers say beside
    the tensors; reads headers only.

    Raises CheckpointError, naming the file, if one is missing, truncated or damaged, or if the index disagrees.
    """
    first = weights_file(folder)
    if first is None:
        pickled = sorted(file.name for end in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{end}"))
        instead = f"; {pickled[0]} is a pickle, which may do more than hold numbers" if pickled else ""
        raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}{instead}; only safetensors checkpoints are "
                              "read: load this one with the tool that made it, and save it as safetensors")
    listed = _read_index(first) if first.suffix == ".json" else None
    files = [first] if listed is None else [folder / name for name in sorted(set(listed.values()))]
    found: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header, said = _read_header(file)
        metadata.update(said)
        for name, stored in header.items():
            if name in found:
                raise CheckpointError(f"{name} stands in two files: {found[name].file} and {file}")
            found[name] = stored
    for name, where in (listed or {}).items():
        if name not in found or found[name].file.name != where:
            raise CheckpointError(f"{first} says that {name} is in {where}, and it is not")
    return found, metadata


def _read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    check_inside(file)
    try:
        version = file_version(file)
        with safe_open(str(file), framework="np"):  # checks offsets, sizes and the file's length
            pass
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length), object_pairs_hook=no_doubles)
        metadata = header.pop("__metadata__", None) or {}
        return {name: Stored(file=file, version=version, dtype=_DTYPES[item["dtype"]], shape=tuple(item["shape"]),
                             start=8 + length + item["data_offsets"][0])
                for name, item in header.items()}, metadata
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete, copy it again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); copy or download it again") from error
    except KeyError as error:
        raise CheckpointError(f"{file} holds a tensor of dtype {error}, which this version cannot read") from error


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = read_json(index)["weight_map"]
        names = {str(name): str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    if outside := [file for file in names.values() if Path(file).name != file or not file.endswith(".safetensors")]:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a safetensors file of this folder")
    return names
