"""Machine: the name of this processor, what it can do and how many threads are used, in one line."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_SHOWN = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def machine_kind() -> str:
    """The best of what kernels are chosen by, or the architecture: where runs of like machines are kept."""
    _, flags = _processor()
    return next((flag for flag in reversed(_SHOWN) if flag in flags), platform.machine())


def machine_line(threads: int) -> str:
    """`AMD EPYC, avx2, 2 of 2 CPUs, 24 GB, Python 3.11.7`."""
    name, flags = _processor()
    has = " ".join(flag for flag in _SHOWN if flag in flags)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{name}, {has}, {threads} of {os.cpu_count()} CPUs, {memory:.0f} GB, Python {platform.python_version()}"


def _processor() -> tuple[str, set[str]]:
    """Its name and flags."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
            elif line.startswith("flags"):
                flags = set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return name, flags


if __name__ == "__main__":  # for the Makefile
    print(machine_kind())
