"""Building the native library: once for all processes, with a sentence and the reference where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpass.kernels import isa
from qpass.kernels.cpu import build, compile_library

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

LINEAR = """
import torch, qpass.kernels.dispatch
from qpass.kernels.cpu import native
from qpass.kernels.registry import LinearCall, choose
from qpass.scheme import preset
from qpass.spec import LinearSpec
s = preset("w4a8").with_group_size(32)
spec = LinearSpec(family=s.family, weight=s.weight, activation=s.activation, out_features=8, in_features=32)
call = LinearCall(spec=spec, device=torch.device("cpu"), dtype=torch.float32)
planned = choose(call)
assert not native.loaded(), "planning must not build"
chosen = choose(call, prepare=True)
print(planned.kernel.name, chosen.kernel.name, native.loaded(), sep="|")
print("|".join(sorted(set(chosen.refusals.values()))))
"""


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines()


@pytest.fixture
def stand_in_compiler(tmp_path: Path) -> Path:
    """A compiler whose linker copies this machine's library, once it was built, and counts its calls: quicker."""
    log, program = tmp_path / "calls", tmp_path / "stand-in"
    program.write_text(f"""#!{sys.executable}
import shutil, sys, time
if "-c" in sys.argv or "-nostdlib" in sys.argv:
    sys.exit()
open({str(log)!r}, "a").write("x")
time.sleep(1)
shutil.copy({str(build.build())!r}, sys.argv[sys.argv.index("-o") + 1])
""")
    program.chmod(0o755)
    return program


@needs_compiler
def test_processes_that_start_together_build_once(tmp_path: Path, stand_in_compiler: Path) -> None:
    cache = tmp_path / "cache"
    together = [run(LINEAR, QPASS_CACHE_DIR=str(cache), CXX=str(stand_in_compiler)) for _ in range(2)]
    for process in together:
        planned, chosen, loaded = finished(process)[0].split("|")
        assert planned == chosen != "linear_reference" and loaded == "True"
    assert (tmp_path / "calls").read_text() == "x"
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob("*.partial"))


@needs_compiler
@pytest.mark.parametrize("damage", [pytest.param("cut", marks=pytest.mark.slow),
                                    pytest.param("empty", marks=pytest.mark.slow), "changed"])  # each builds anew
def test_a_damaged_library_is_built_anew(tmp_path: Path, stand_in_compiler: Path, damage: str) -> None:
    environment = {"QPASS_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(stand_in_compiler)}
    finished(run(LINEAR, **environment))
    (library,) = (tmp_path / "cache").glob("*.so")
    whole = library.read_bytes()
    middle = len(whole) // 2
    library.write_bytes({"cut": whole[:middle], "empty": b"",
                         "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]}[damage])
    assert finished(run(LINEAR, **environment))[0].split("|")[2] == "True"
    assert library.read_bytes() == whole and (tmp_path / "calls").read_text() == "xx"


@pytest.mark.slow
@needs_compiler
def test_a_fresh_cache_is_filled_by_the_real_compiler(tmp_path: Path) -> None:
    together = [run(LINEAR, QPASS_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert {finished(process)[0].split("|")[2] for process in together} == {"True"}
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_without_a_compiler_the_reference_runs(tmp_path: Path) -> None:
    first, reasons = finished(run(LINEAR, QPASS_CACHE_DIR=str(tmp_path), CXX="/nowhere/c++"))
    assert first == "linear_reference|linear_reference|False"
    assert "CXX='/nowhere/c++' is not a program that can be run; install g++ or set CXX" in reasons
    assert list(tmp_path.iterdir()) == []


def test_a_failing_compiler_is_asked_once(tmp_path: Path) -> None:
    log, program = tmp_path / "calls", tmp_path / "broken"
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {log}\necho 'plain.cpp:1:1: error: out of luck' >&2\nexit 1\n")
    program.chmod(0o755)
    first, reasons = finished(run(LINEAR, QPASS_CACHE_DIR=str(tmp_path / "cache"), CXX=str(program)))
    assert first.split("|")[1:] == ["linear_reference", "False"]
    assert "did not compile: plain.cpp:1:1: error: out of luck; run this to see all of it:" in reasons
    asked = [line.split(" -c ")[1].split()[0] for line in log.read_text().splitlines() if " -c " in line]
    assert asked and len(asked) == len(set(asked)), "no file is compiled again for the next kernel"
    assert not list((tmp_path / "cache").glob("*.so")) and not list((tmp_path / "cache").glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    program = tmp_path / "unused"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    first, reasons = finished(run(LINEAR, QPASS_CACHE_DIR=str(blocked / "cache"), CXX=str(program)))
    assert first.split("|")[1:] == ["linear_reference", "False"]
    assert "set QPASS_CACHE_DIR to a folder that can be written" in reasons


def test_another_compiler_or_cache_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QPASS_CACHE_DIR", str(tmp_path))
    assert build.cache_dir() == tmp_path and build.source_hash() == build.source_hash()
    programs = []
    for name in ("one", "two"):
        programs.append(tmp_path / name)
        programs[-1].write_text(f"#!/bin/sh\n# {name}{name if name == 'one' else ''}\n")
        programs[-1].chmod(0o755)
    paths = set()
    for program in programs:
        monkeypatch.setenv("CXX", str(program))
        assert build.compiler() == [str(program)]
        paths.add(build._built_path([str(program)]))
    assert len(paths) == 2
    monkeypatch.setenv("CXX", f"{programs[0]} -m64")
    assert build.compiler() == [str(programs[0]), "-m64"]


def test_every_source_has_a_part_and_machines_get_what_they_can_run() -> None:
    stems = {source.stem for source in compile_library.SOURCES.glob("*.cpp")}
    assert {stem for part in compile_library.PARTS.values() for stem in part} == stems
    assert set(compile_library.NEEDS.values()) <= set(isa.X86_LEVELS)
    for i, level in enumerate(isa.X86_LEVELS):
        products = {source.stem for source in compile_library.sources_of("products", isa.X86_LEVELS[i:])}
        assert ("amx" in products, "vnni" in products) == (level == "amx_int8", level in ("amx_int8", "avx512_vnni"))
        assert {"avx2", "plain", "shim", "runtime"} <= products


def test_a_lower_instruction_set_is_a_library_of_its_own_where_it_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for has in (set(isa._FLAGS["avx2"]), {flag for flags in isa._FLAGS.values() for flag in flags}):
        monkeypatch.setattr(isa, "_cpu_flags", lambda has=has: has)
        for cap in ("amx_int8", "avx512_vnni", "avx2"):
            monkeypatch.setenv("QPASS_ISA", cap)
            paths.append(build._built_path([sys.executable]))
            assert build._built_path([sys.executable], "decoded") == build._built_path([sys.executable], "decoded")
    assert paths[0] == paths[1] == paths[2] == paths[5] and len(set(paths)) == 3


@pytest.mark.slow
@needs_compiler
def test_every_part_is_built_when_it_is_asked_for(tmp_path: Path) -> None:
    code = """
from qpass.kernels.cpu import compile_library, native
for part in compile_library.PARTS:
    assert not native.loaded(part) and native.prepare(part) is None and native.loaded(part), part
"""
    assert finished(run(code, QPASS_CACHE_DIR=str(tmp_path))) == []
    assert {path.name.split("-")[0].removeprefix("qpass_x86_") for path in tmp_path.glob("*.so")} == set(
        compile_library.PARTS)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPASS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_dir() == Path("/somewhere/qpass")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_dir() == Path.home() / ".cache" / "qpass"


def test_a_graph_compiled_earlier_loads_the_library_itself() -> None:
    code = """
import torch, qpass.kernels.dispatch
from qpass.kernels.cpu import native
x, q, s = torch.randn(1, 32), torch.full((32 * 64 // 2,), 0x88, dtype=torch.uint8), torch.ones(2, 1, 16)
assert not native.loaded()
y = torch.ops.qpass_x86.linear.default(x, q, s, None, None, None, 8, 32, 4, 1, 0)
assert native.loaded() and y.shape == (1, 8) and not y.any()
print("ok")
"""
    if build.find_library() is None and build.compiler() is None:
        pytest.skip(build.missing_compiler())
    assert finished(run(code)) == ["ok"]
