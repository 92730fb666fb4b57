"""Large pages: memory in pages of 2 MiB where Linux gives them, for a packed weight, or for what a file is read into.

At one token a product reads its whole weight once, and looking up the addresses of pages of 4 KiB takes a fifth of that
time; reading a file into fresh memory is half as fast as the file is in the cache, for each page is made when it is
first touched. Linux gives large pages without being asked, on request, or never:
/sys/kernel/mm/transparent_hugepage/enabled says which.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 2 << 20
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of any values. Only large pages that lie inside it are asked for, so that it takes no more
    memory than another tensor; one smaller than a page is an ordinary tensor."""
    nbytes = math.prod(shape) * dtype.itemsize
    if _ADVICE is None or nbytes < PAGE:
        return torch.empty(*shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, (nbytes // PAGE + 2) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
        memory.madvise(_ADVICE, start, nbytes // PAGE * PAGE)
    except OSError:  # no room for another mapping, or a Linux built without large pages
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start).view(dtype).view(*shape)


def ask_for(tensor: Tensor) -> Tensor:
    """The same tensor, whose memory nobody has touched yet, after asking that the large pages that lie inside it be
    made as such. No more than a hint: memory that is refused stays as it is."""
    start = -(-tensor.data_ptr() // PAGE) * PAGE
    nbytes = (tensor.data_ptr() + tensor.nbytes - start) // PAGE * PAGE
    advise = getattr(ctypes.CDLL(None), "madvise", None) if _ADVICE is not None and nbytes > 0 else None
    if advise is not None and tensor.device.type == "cpu" and tensor.is_contiguous():
        advise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), _ADVICE)
    return tensor
