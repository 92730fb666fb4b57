"""Build: the C++ sources beside this file in, one shared library out, compiled by one compiler call and cached.

The cache is per user (QPASS_CACHE_DIR, else XDG_CACHE_HOME or ~/.cache, then qpass). A library's name holds a hash of
all that it was made from, and its last bytes a hash of those before them: loading one that a full disk or a crash cut
short would end the process. A library that came with the package is preferred if its hash fits the sources.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off")
_HASH = hashlib.sha256().digest_size
_HERE = Path(__file__).parent
_SOURCES = _HERE / "csrc"
_TORCH = Path(torch.__file__).parent


class BuildFailed(Exception):
    """The library could not be built; the message is a sentence fit for a refusal."""


def cache_dir() -> Path:
    """Where libraries built by this user are kept."""
    if own := os.environ.get("QPASS_CACHE_DIR"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qpass"


def compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, else the first of g++, clang++ and c++ that exists (Inductor's choice too)."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["g++", "clang++", "c++"]:
        words = shlex.split(candidate)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    return None


def missing_compiler() -> str:
    """The sentence that says which compiler was looked for."""
    wanted = os.environ.get("CXX")
    looked = f"CXX={wanted!r} is not a program that can be run" if wanted else "none of g++, clang++, c++ was found"
    return f"needs a C++ compiler to build the native library once, and {looked}; install g++ or set CXX"


def find_library() -> Path | None:
    """The library that came with the package or that was built earlier, if its hash fits."""
    shipped = _HERE / f"qpass_x86-{source_hash()}.so"
    if shipped.exists():
        return shipped
    found = compiler()
    built = _built_path(found) if found else None
    return built if built is not None and _whole(built) else None


def build() -> Path:
    """The library's path; compiles it first if need be. Processes that ask at once wait for the one that compiles.

    Raises BuildFailed with what went wrong, why, and what to do.
    """
    if (found := find_library()) is not None:
        return found
    command = compiler()
    if command is None:
        raise BuildFailed(missing_compiler())
    target = _built_path(command)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not _whole(target):
                _compile(command, target)
    except OSError as why:
        raise BuildFailed(f"needs to write the native library to {target.parent}, which failed ({why}); "
                          "set QPASS_CACHE_DIR to a folder that can be written") from why
    return target


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Of every source file and flag: what a library that came with the package must fit."""
    digest = hashlib.sha256(repr((FLAGS, platform.machine(), sys.platform)).encode())
    for file in sorted(_SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _built_path(command: list[str]) -> Path:
    # The compiler's file stands for its version: asking it would cost more than loading the library.
    program = os.stat(command[0])
    made_by = repr((command, program.st_size, program.st_mtime_ns, str(torch.__version__)))
    digest = hashlib.sha256((source_hash() + made_by).encode()).hexdigest()[:16]
    return cache_dir() / f"qpass_x86-{digest}.so"


def _whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_HASH]).digest() == content[-_HASH:]


def _compile(command: list[str], target: Path) -> None:
    partial = target.with_name(f"{target.stem}.{os.getpid()}.partial")
    line = [*command, *FLAGS, "-I", str(_TORCH / "include"), *map(str, sorted(_SOURCES.glob("*.cpp"))),
            "-o", str(partial), "-L", str(_TORCH / "lib"), "-ltorch_cpu"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            errors = [text for text in done.stderr.splitlines() if "error" in text] or done.stderr.splitlines()
            raise BuildFailed(f"the native library did not compile: {errors[0] if errors else 'no message'}; "
                              f"run this to see all of it: {shlex.join(line)}")
        content = partial.read_bytes()
        partial.write_bytes(content + hashlib.sha256(content).digest())  # the loader does not look behind the sections
        os.replace(partial, target)  # a reader sees no library or a whole one
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
