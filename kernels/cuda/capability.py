"""Capability: a GPU's compute capability as `sm_XX`, and why a kernel cannot run on one that lacks something."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import cache

import torch

CAPABILITIES = {70: "Volta", 75: "Turing", 80: "Ampere", 89: "Ada", 90: "Hopper"}
"""Those that a support matrix speaks of, by the number of their `sm_`."""

_assumed: list[int] = []


def capability_of(device: torch.device | str) -> int | None:
    """75, 80, 89, 90, ... of a CUDA device; None for another device, or where there is no GPU to ask."""
    if _assumed:
        return _assumed[-1]
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _capability(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@contextlib.contextmanager
def assume(capability: int) -> Iterator[None]:
    """Answer as if every GPU were an `sm_<capability>`, so that a table can be made without any."""
    _assumed.append(capability)
    try:
        yield
    finally:
        _assumed.pop()


def needs(least: int, device: torch.device | str, what: str = "") -> str | None:
    """None if the device has `sm_<least>` or there is no GPU to ask; otherwise the sentence that says what it has."""
    found = capability_of(device)
    if found is None or found >= least:
        return None
    name = CAPABILITIES.get(found)
    return f"needs sm_{least}{' for ' + what if what else ''}, this GPU is sm_{found}" + (f" ({name})" if name else "")


def machine_refuses(isa: str) -> str | None:
    """The same of `isa`, "sm_80" say, for the best GPU of this machine."""
    if not torch.cuda.is_available() or torch.cuda.device_count() == 0:
        return f"needs {isa}, there is no CUDA device here"
    best = max(_capability(i) for i in range(torch.cuda.device_count()))
    return None if best >= int(isa.removeprefix("sm_")) else f"needs {isa}, the best GPU here is sm_{best}"


def triton_refuses() -> str | None:
    """Why programs cannot be compiled, or None if Triton is installed; does not import it."""
    return None if importlib.util.find_spec("triton") else "needs Triton: pip install triton"
