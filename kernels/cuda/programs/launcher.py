"""Launcher: a Triton program in, what starts it out, visible to torch.compile where that is looking."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_LANGUAGE = {torch.int8: tl.int8, torch.float8_e4m3fn: tl.float8e4nv, torch.bfloat16: tl.bfloat16,
             torch.float16: tl.float16, torch.float32: tl.float32}


def language(dtype: torch.dtype, device: torch.device) -> Any:
    """Triton's name for a dtype. The interpreter, on a CPU, takes bfloat16 for integers where it computes."""
    return _LANGUAGE[torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype]


def launcher(program: Any) -> Any:
    """`launcher(program)[grid](...)` runs it. Only a mode that watches operations is shown the launch as one of them;
    else the program is its own launcher, which is quicker, and always if Triton interprets it."""
    if not isinstance(program, triton.runtime.JITFunction) or not is_in_torch_dispatch_mode():
        return program
    return torch.library.wrap_triton(program)
