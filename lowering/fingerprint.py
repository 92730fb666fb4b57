"""Fingerprint: everything that decides what the pipeline does to a graph, in one hash, for the compiler's cache key."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import qpass
from qpass.kernels import attention, isa, small_products
from qpass.kernels.registry import KERNELS, load_builtin
from qpass.lowering.pipeline import passes

_SETTINGS = ("QPASS_CHECK", "QPASS_KERNEL", "QPASS_ISA")


def pipeline_fingerprint() -> str:
    """A hash that changes with any pass's source, order or state, the kernel table, the machine, and the settings."""
    load_builtin()
    facts: list[str] = [_own_sources(), qpass.__version__]
    facts += [f"{p.name} {p.enabled} {_source(p.fn)}" for p in passes()]
    for k in sorted(KERNELS.values(), key=lambda k: k.name):
        facts.append(f"{k.name} {k.op} {k.linear} {k.scheme} {k.device} {k.isa} {k.layout.name} {k.priority} "
                     f"{sorted(k.forms)} "
                     f"{'' if k.native_call is None else _source(k.native_call)}")
    facts += [_source(fn) for fn in (*attention.DECIDES, *small_products.DECIDES)]
    facts.append(f"{small_products.MOST_WORK} {small_products.DTYPES}")
    facts += [*isa.machine_has(), *(f"{name}={os.environ.get(name)}" for name in _SETTINGS)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _own_sources() -> str:
    """The files whose text decides what the built-in passes write into a graph."""
    root = Path(qpass.__file__).parent
    here = Path(__file__).parent
    digest = hashlib.sha256()
    kernels = Path(inspect.getfile(isa)).parent
    for path in (*sorted(here.glob("*.py")), kernels / "reference" / "activation.py", root / "ops.py",
                 root / "spec.py", root / "experts_spec.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _source(fn: Callable[..., Any]) -> str:
    """A function's source, or what stands for it: its byte code, or its name."""
    try:
        return inspect.getsource(inspect.unwrap(fn))
    except (OSError, TypeError):
        code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)
        return f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__qualname__)} " \
               f"{code.co_code.hex() + repr(code.co_consts) if code is not None else ''}"
