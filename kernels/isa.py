"""ISA: what this machine's processor can do, read from the operating system, without compiling anything; GPUs too."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

# Best first. Each level includes those after it; "x86_64" is plain C and runs on all of them.
X86_LEVELS = ("amx_int8", "avx512_vnni", "avx2", "x86_64")
_FLAGS = {
    "amx_int8": ("amx_tile", "amx_int8", "amx_bf16", "gfni"),
    "avx512_vnni": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "x86_64": (),
}


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def machine_has() -> tuple[str, ...]:
    """The x86 levels of this machine, best first, capped by the variable QPASS_ISA; () on other machines."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    found, levels = [], list(X86_LEVELS)
    cap = os.environ.get("QPASS_ISA")
    if cap:
        if cap not in X86_LEVELS:
            raise ValueError(f"QPASS_ISA must be one of {', '.join(X86_LEVELS)}, got {cap!r}")
        levels = levels[levels.index(cap):]
    for i, level in enumerate(levels):
        needed = {flag for below in levels[i:] for flag in _FLAGS[below]}
        if needed <= _cpu_flags():
            found.append(level)
    return tuple(found)


def machine_refuses(isa: str | None) -> str | None:
    """None if this machine has `isa`, otherwise the sentence that says what it has instead."""
    if isa is not None and isa.startswith("sm_"):
        from qpass.kernels.cuda import capability

        return capability.machine_refuses(isa)
    if isa is None or isa in machine_has():
        return None
    best = machine_has()[0] if machine_has() else platform.machine()
    cap = " (capped by QPASS_ISA)" if os.environ.get("QPASS_ISA") else ""
    return f"needs {isa}, this CPU has {best}{cap}"
