"""Mapped pages: a tensor that is a view of a mapped file in, its pages out of this process's memory.

Transformers maps a checkpoint and hands out views. What was read of them counts as memory of the process until the
file is closed, though nobody needs it any more: without this, quantizing while loading peaks at the float model.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_WORTH_IT = 1 << 20  # bytes; the kernel's list of mappings is read each time, in a tenth of a millisecond


def release_pages(tensor: Tensor) -> bool:
    """Let go of the pages of `tensor` if they are a file's, mapped; they are read again if somebody asks.

    Only for tensors that nobody wrote to: a changed page would be lost. Returns whether anything was done; memory that
    is no file's, and systems without /proc, are left alone.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < _WORTH_IT or not tensor.is_contiguous():
        return False
    page = mmap.PAGESIZE
    start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None or not _is_file(start, end):
        return False
    return bool(advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED) == 0)


def _is_file(start: int, end: int) -> bool:
    """Whether all of these addresses are one mapping of a file that ends in .safetensors."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        if line.endswith((".safetensors", ".safetensors (deleted)")):
            low, _, high = line.split(maxsplit=1)[0].partition("-")
            if int(low, 16) <= start and end <= int(high, 16):
                return True
    return False
