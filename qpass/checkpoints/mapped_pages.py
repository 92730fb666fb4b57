"""Mapped pages: tensors that are views of a mapped file in, their pages out of this process's memory.

Transformers maps a checkpoint and hands out views. What was read of them counts as memory of the process until the
file is closed, though nobody needs it any more: without this, quantizing while loading peaks at the float model.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_WORTH_IT = 1 << 20  # bytes of a tensor
_AT_ONCE = 64 << 20  # bytes; the kernel's list of mappings, thousands of lines, takes milliseconds to read


class ReadPages:
    """Tensors that were read and that nobody needs; their pages are let go a few at a time.

    Only for tensors that nobody wrote to: a changed page would be lost. Memory that is no mapped file's, and systems
    without /proc, are left alone.
    """

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []  # held, so that their addresses stay theirs

    def add(self, tensor: Tensor) -> None:
        """Let go of the pages of `tensor` soon; they are read again if somebody asks for them."""
        if tensor.device.type == "cpu" and tensor.nbytes >= _WORTH_IT and tensor.is_contiguous():
            self._waiting.append(tensor)
            if sum(waiting.nbytes for waiting in self._waiting) >= _AT_ONCE:
                self.release()

    def release(self) -> int:
        """Let go of those that wait, now. Returns of how many: those that are views of one mapped file."""
        files, released = _mapped_files() if self._waiting else [], 0
        for tensor in self._waiting:
            page = mmap.PAGESIZE
            start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
            if any(low <= start and end <= high for low, high in files):
                released += _let_go(start, end - start)
        self._waiting = []
        return released


def _mapped_files() -> list[tuple[int, int]]:
    """First address, and the one behind the last, of each mapping of a file that ends in .safetensors."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    ranges = (line.split(maxsplit=1)[0].partition("-") for line in lines
              if line.endswith((".safetensors", ".safetensors (deleted)")))
    return [(int(low, 16), int(high, 16)) for low, _, high in ranges]


def _let_go(start: int, nbytes: int) -> bool:
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    return advise is not None and bool(
        advise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED) == 0)
