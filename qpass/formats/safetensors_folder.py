"""Safetensors folder: a folder in, its tensors' facts at once and their numbers, a tensor at a time, out.

Tensors are read, not mapped: pages of a mapped file count as this process's memory for as long as the file is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Stored
from qpass.formats.safetensors_file import file_version, read_folder


class SafetensorsFolder:
    """The Source of every format whose tensors stand in model.safetensors, or in shards that an index lists."""

    def __init__(self, folder: Path) -> None:
        self.tensors: Mapping[str, Stored]
        self.metadata: Mapping[str, Any]
        self.tensors, self.metadata = read_folder(folder)

    def read(self, names: Iterable[str], at: int | None = None) -> dict[str, Tensor]:
        """The tensors, or what stands at `at` in the first dimension of each, in memory of their own.

        Raises CheckpointError if a file changed since its header was read.
        """
        return {name: _read(self.tensors[name], at) for name in names}


def _read(stored: Stored, at: int | None) -> Tensor:
    shape, start = stored.shape, stored.start
    if at is not None:
        shape = shape[1:]
        start += at * (stored.nbytes // stored.shape[0])
    tensor = torch.empty(shape, dtype=stored.dtype)
    try:
        with open(stored.file, "rb", buffering=0) as file:
            if file_version(file.fileno()) != stored.version:
                raise CheckpointError(f"{stored.file} changed while it was being read; load the folder again")
            file.seek(start)
            if tensor.numel():
                _fill(tensor.reshape(-1).view(torch.uint8).numpy().data, file)
    except OSError as error:
        raise CheckpointError(f"cannot read {stored.file}: {error}") from error
    return tensor


def _fill(left: memoryview, file: Any) -> None:
    while left:  # a single read gives 2 GB at most
        count = file.readinto(left)
        if not count:
            raise OSError("the file ends within a tensor")
        left = left[count:]
