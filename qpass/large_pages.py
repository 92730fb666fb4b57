"""Large pages: a shape and a dtype in, memory for a packed weight out, in pages of 2 MiB where Linux gives them.

At one token a product reads its whole weight once, and looking up the addresses of pages of 4 KiB takes a fifth of that
time. Linux gives large pages without being asked, on request, or never:
/sys/kernel/mm/transparent_hugepage/enabled says which.
"""

from __future__ import annotations

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
    mapped = _mapped(shape, dtype)
    return torch.empty(*shape, dtype=dtype) if mapped is None else mapped


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same of zeros, which are not written: what was never used takes no memory."""
    mapped = _mapped(shape, dtype)
    return torch.zeros(*shape, dtype=dtype) if mapped is None else mapped


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """New memory, which holds zeros; None where it is not worth while or cannot be had."""
    nbytes = math.prod(shape) * dtype.itemsize
    if _ADVICE is None or nbytes < PAGE:
        return None
    try:
        memory = mmap.mmap(-1, (nbytes // PAGE + 2) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
        memory.madvise(_ADVICE, start, nbytes // PAGE * PAGE)
    except OSError:  # no room for another mapping, or a Linux built without large pages
        return None
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start).view(dtype).view(*shape)
