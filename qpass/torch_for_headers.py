"""Torch for headers: nothing in; torch, imported in two thirds of the time by leaving out what only tracing needs.

Of the 2.0 s that `import torch` takes (2.13, one core of an AMD EPYC), 0.6 are the shapes that its operators give to
fake tensors, with the decompositions, references and prims below them: what tracing needs, and looking at dtypes does
not. Garbage collection, which has nothing to find among modules being imported, is another 0.1.
"""

from __future__ import annotations

import gc
import sys
from types import ModuleType

_FOR_TRACING = "torch._meta_registrations"  # torch imports it for what importing it registers


def import_torch_without_tracing() -> None:
    """Import torch so that nothing can be traced or compiled in this process, which should look at headers and end.

    No effect if torch is imported already.
    """
    if "torch" in sys.modules:
        return
    sys.modules[_FOR_TRACING] = ModuleType(_FOR_TRACING, "left out by qpass.torch_for_headers")
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.enable()
