"""Lent memory: a tensor's shape and dtype in, memory to read it into out, the same again once nobody holds the last.

Where each weight is read, rounded and let go, memory made anew for each costs as much as reading: the system fills
every page with zeros first.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class LentMemory:
    """One block of memory, as large as the largest tensor so far."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._unused = sys.getrefcount(self._bytes)  # while no tensor lies in them

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor. While it, or a view of it, lives, the next one gets memory of its own."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        if sys.getrefcount(self._bytes) != self._unused or len(self._bytes) < nbytes:
            self._bytes = bytearray()  # goes first, so that never two blocks are held for one tensor
            self._bytes = bytearray(nbytes)
        return torch.frombuffer(self._bytes, dtype=torch.uint8, count=nbytes).view(dtype).view(shape)
