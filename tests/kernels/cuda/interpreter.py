"""Interpreter: makes Triton run programs on CPU tensors in this process; call it before anything imports Triton."""

from __future__ import annotations

import os
import sys


def use_interpreter() -> None:
    """Set TRITON_INTERPRET, and let the interpreter take NumPy 2.4, whose int() refuses an array of one element.

    Raises RuntimeError if Triton is loaded already: its own functions are compiled ones by then.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise RuntimeError("Triton is loaded; TRITON_INTERPRET=1 must be set before")
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *rest: object) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

    if getattr(tl, "_qpass_patched", False):
        return
    tl._qpass_patched = True
    interpreter._patch_lang_tensor = patched
