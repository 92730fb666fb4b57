"""Safetensors folder: a folder in, its tensors' facts at once and their numbers, a tensor at a time, out.

Tensors are read, not mapped: pages of a mapped file count as this process's memory for as long as the file is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpass.dtype import torch_dtype
from qpass.formats.checkpoint import Stored, read_into
from qpass.formats.lent_memory import LentMemory
from qpass.formats.safetensors_file import read_folder

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsFolder:
    """The Source of every format whose tensors stand in model.safetensors, or in shards that an index lists."""

    def __init__(self, folder: Path) -> None:
        self.tensors: Mapping[str, Stored]
        self.metadata: Mapping[str, Any]
        self.tensors, self.metadata = read_folder(folder)

    def read(self, names: Iterable[str], at: int | None = None, lent: LentMemory | None = None,
             rows: slice | None = None) -> dict[str, Tensor]:
        """The tensors, or what stands at `at` or in `rows` of the first dimension of each, in memory of their own or
        that is `lent`.

        Raises CheckpointError if a file changed since its header was read.
        """
        return {name: _read(self.tensors[name], at, lent, rows) for name in names}


def _read(stored: Stored, at: int | None, lent: LentMemory | None, rows: slice | None) -> Tensor:
    shape, start = stored.shape, stored.start
    if at is not None:
        shape = shape[1:]
        start += at * (stored.nbytes // stored.shape[0])
    elif rows is not None:
        start += rows.start * (stored.nbytes // shape[0])
        shape = (rows.stop - rows.start, *shape[1:])
    dtype = torch_dtype(stored.dtype)
    tensor = torch.empty(shape, dtype=dtype) if lent is None else lent.tensor(shape, dtype)
    if tensor.numel():
        read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, stored, start)
    return tensor
