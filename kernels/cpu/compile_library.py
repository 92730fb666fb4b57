"""Compile library: C++ sources beside this file in, one shared library out, with one compiler process a core.

All of them make the library of a wheel. Where it is compiled when first used there is one library for each of PARTS,
so that nobody waits for what he does not use, and only of what the machine can run.

It needs neither torch nor qpass, only where torch's headers and libraries are: setup.py loads it by its path to put a
library into a wheel (QPASS_NATIVE=1, or 0 to leave it out). A library's last bytes are a hash of those before them:
loading one that a full disk or a crash cut short would end the process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off")
SOURCES = Path(__file__).parent / "csrc"
_HASH = hashlib.sha256().digest_size
PARTS = {
    "products": ("shim", "driver", "experts", "isas", "plain", "avx2", "vnni", "amx", "amx_codes", "amx_float", "pack",
                 "quantize_weight", "largest", "runtime"),
    "decoded": ("shim_decoded", "decoded", "decoded_plain", "decoded_avx2", "decoded_amx", "pack",
                "encode_weight", "largest", "runtime"),
    "attention": ("shim_attention", "attention_float", "attention_float_avx2", "attention_float_avx512", "runtime"),
    "cache": ("attention", "attention_avx2", "attention_avx512", "runtime"),
    "calibration": ("search_ranges", "round_columns", "runtime"),
}
"""Each part's sources: integer weights, those of csrc/decoded.h, attention over floats and over a quantized cache, what
calibration does to weights."""
NEEDS = {"vnni": "avx512_vnni", "amx": "amx_int8", "amx_codes": "amx_int8", "amx_float": "amx_int8",
         "decoded_amx": "amx_int8", "attention_avx512": "avx512_vnni",
         "attention_float_avx512": "avx512_vnni"}
"""The level of kernels/isa.py that a source is for, where that is not everybody's."""
_NO_LOOPS = ("-Og",)  # for files that only pass tensors on: they hold torch's templates, and -O1 takes 0.8 s longer
_TORCH = "libtorch_cpu.so"
_TORCH_HEADERS = 20_000  # what reading torch's headers costs, in characters of a file of ours
# Those of many template instantiations, which their length does not show; measured, the longest first.
_LONGEST = ("vnni", "avx2", "decoded_avx2", "decoded_amx", "amx")


class BuildFailed(Exception):
    """The library could not be built; the message is a sentence fit for a refusal."""


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


def library_name(digest: str, part: str = "all") -> str:
    """The file name of a library made from what `digest` is a hash of."""
    return f"qpass_x86_{part}-{digest}.so"


def sources_of(part: str, levels: Sequence[str]) -> list[Path]:
    """What a part is compiled from for a machine of these levels of kernels/isa.py."""
    return [SOURCES / f"{stem}.cpp" for stem in PARTS[part] if NEEDS.get(stem) in (None, *levels)]


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Of every source file and flag: what a library that came with the package must fit."""
    digest = hashlib.sha256(repr((FLAGS, platform.machine(), sys.platform)).encode())
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def whole(library: Path) -> bool:
    """Whether the file is there, with all of its bytes as they were written."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_HASH]).digest() == content[-_HASH:]


def compile_library(command: list[str], torch: Path, target: Path, sources: Sequence[Path] | None = None) -> None:
    """Write the library to `target`: readers see none or a whole one. `torch` is torch's folder in site-packages,
    `sources` are those of `sources_of`, or all.

    Raises BuildFailed with the compiler's first error, OSError if `target`'s folder cannot be written.
    """
    include = ["-I", str(torch / "include")]
    sources = sorted(sources or SOURCES.glob("*.cpp"), key=_cost, reverse=True)  # the longest first: no core idles
    at_once = [*command, *FLAGS, *include, *map(str, sources), "-shared", "-o", os.devnull]
    with tempfile.TemporaryDirectory(prefix=f"{target.stem}-", suffix=".partial", dir=target.parent) as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        lines = [[*command, *FLAGS, *(_NO_LOOPS if source.stem.startswith("shim") else ()), *include, "-c", str(source),
                  "-o", made]
                 for source, made in zip(sources, objects, strict=True)]
        # An empty library of torch's name: to read all of torch's symbols takes the linker 0.5 s, and it needs none.
        lines.append([*command, "-shared", "-nostdlib", "-x", "c", os.devnull, f"-Wl,-soname,{_TORCH}",
                      "-o", f"{folder}/{_TORCH}"])
        made = Path(folder, target.name)
        pool = ThreadPoolExecutor(_cores())
        try:
            for _ in pool.map(_run, lines):
                pass
            _run([*command, *FLAGS, *objects, "-shared", "-Wl,--push-state,--no-as-needed", f"{folder}/{_TORCH}",
                  "-Wl,--pop-state", "-o", str(made)])
        except _Failed as why:
            raise BuildFailed(f"the native library did not compile: {why}; run this to see all of it: "
                              f"{shlex.join(at_once)}") from None
        finally:
            pool.shutdown(cancel_futures=True)
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())  # the loader does not look behind the sections
        os.replace(made, target)


class _Failed(Exception):
    pass


def _run(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        errors = [text for text in done.stderr.splitlines() if "error" in text] or done.stderr.splitlines()
        raise _Failed(errors[0] if errors else "no message")


def _cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cost(source: Path) -> int:
    """A guess at how long a file takes to compile: its length with every header of ours, unless it is known."""
    if source.stem in _LONGEST:
        return (len(_LONGEST) - _LONGEST.index(source.stem)) * 1_000_000
    seen: set[Path] = set()
    cost, waiting = 0, [source]
    while waiting:
        file = waiting.pop()
        if file not in seen and file.exists():
            seen.add(file)
            text = file.read_text()
            cost += len(text) + (_TORCH_HEADERS if "#include <torch/" in text else 0)
            waiting += [SOURCES / name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]
    return cost
