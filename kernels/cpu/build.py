"""Build: the path of the native library, which came with the package, was built earlier, or is compiled now.

The cache is per user (QPASS_CACHE_DIR, else XDG_CACHE_HOME or ~/.cache, then qpass). A library's name holds a hash of
all that it was made from. One that came with the package holds all parts, and is preferred if its hash fits the
sources. In the cache each part is a library of its own, of what this machine can run (or less, if QPASS_ISA says so).
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qpass.kernels.cpu.compile_library import (
    BuildFailed,
    compile_library,
    compiler,
    library_name,
    missing_compiler,
    source_hash,
    sources_of,
    whole,
)
from qpass.kernels.isa import machine_has

_HERE = Path(__file__).parent
_WHAT = {"products": "CPU kernels", "decoded": "CPU kernels for float weights", "attention": "CPU kernel for attention",
         "cache": "CPU kernel for attention over a quantized cache", "calibration": "CPU kernels for calibration"}


def cache_dir() -> Path:
    """Where libraries built by this user are kept."""
    if own := os.environ.get("QPASS_CACHE_DIR"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qpass"


def shipped_library() -> Path | None:
    """The library that came with the package, if its hash fits the sources."""
    shipped = _HERE / library_name(source_hash())
    return shipped if shipped.exists() else None


def find_library(part: str = "products") -> Path | None:
    """The library that came with the package, or the part that was built earlier, if its hash fits."""
    if (shipped := shipped_library()) is not None:
        return shipped
    found = compiler()
    built = _built_path(found, part) if found else None
    return built if built is not None and whole(built) else None


def build(part: str = "products") -> Path:
    """The path of a part in the cache; compiles it first if need be, and says so on stderr: it takes seconds.

    Processes that ask at once wait for the one that compiles. Raises BuildFailed with what went wrong, why, and what
    to do.
    """
    command = compiler()
    if command is None:
        raise BuildFailed(missing_compiler())
    target = _built_path(command, part)
    if whole(target):
        return target
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not whole(target):
                _say(f"compiling the {_WHAT[part]} for this machine; this is done once and takes some seconds")
                start = time.monotonic()
                compile_library(command, Path(torch.__file__).parent, target, sources_of(part, machine_has()))
                _say(f"compiled in {time.monotonic() - start:.1f} s, kept in {target.parent}")
    except OSError as why:
        raise BuildFailed(f"needs to write the native library to {target.parent}, which failed ({why}); "
                          "set QPASS_CACHE_DIR to a folder that can be written") from why
    return target


def _built_path(command: list[str], part: str = "products") -> Path:
    # The compiler's file stands for its version: asking it would cost more than loading the library.
    program = os.stat(command[0])
    sources = [source.stem for source in sources_of(part, machine_has())]
    made_by = repr((command, program.st_size, program.st_mtime_ns, str(torch.__version__), sources))
    return cache_dir() / library_name(hashlib.sha256((source_hash() + made_by).encode()).hexdigest()[:16], part)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that compiles the CPU kernels")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(what: str) -> None:
    if sys.stderr is not None:  # pythonw and some daemons have none
        print(f"qpass: {what}", file=sys.stderr, flush=True)
