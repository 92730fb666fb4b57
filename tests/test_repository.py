"""The repository itself: file sizes, names, first lines, nothing left over, and documents that tell the truth."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

import qpass
from tests.source_tree import FOLDERS, ROOT, modules, place, strings, syntax

MAX_LINES = 300
FOLDER_NAMES = {"qpass", "lowering", "kernels", "tests", "examples", ".ci"}
EMPTY_WORDS = {"utils", "util", "helpers", "helper", "common", "core", "base", "manager"}
# Model families belong to the tests, the examples, the demo and the help texts: the library knows graphs.
FAMILIES = re.compile(r"llama|qwen|gemma|mistral|mixtral|gpt_?2|smollm|deepseek|\bphi\d|falcon|opt_for", re.IGNORECASE)
NAMES_A_MODEL = ("qpass/demo", "qpass/cli")
SOURCES = {".py", ".cpp", ".h", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ""}


@cache
def files() -> tuple[Path, ...]:
    """Every file that is, or would be, under version control."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive
        found = [Path(folder) / name for folder, _, names in os.walk(ROOT) for name in names]
        found = [path for path in found if path.relative_to(ROOT).parts[0] in FOLDER_NAMES
                 and "__pycache__" not in path.parts]
    return tuple(sorted(path for path in found if path.is_file()))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts(*suffixes: str) -> list[tuple[str, str]]:
    """(path, text) of every file with one of these suffixes."""
    return [(relative(path), path.read_text()) for path in files() if path.suffix in suffixes]


def test_top_level_folders() -> None:
    assert {relative(p).split("/")[0] for p in files() if p.parent != ROOT} <= FOLDER_NAMES


def test_library_files_are_short() -> None:
    sources = [p for f in FOLDERS.values() for p in f.rglob("*") if p.suffix in {".py", ".cpp", ".h"}]
    counts = {relative(path): len(path.read_text().splitlines()) for path in sources}
    assert len(counts) > 20
    too_long = {path: count for path, count in counts.items() if count > MAX_LINES}
    assert not too_long, f"split by concept what has more than {MAX_LINES} lines: {too_long}"


def test_files_are_small() -> None:
    assert not [relative(path) for path in files() if path.stat().st_size > 1 << 20]


def test_names_mean_something() -> None:
    assert not [relative(path) for path in files()
                if EMPTY_WORDS & set(re.split(r"[_.\W]", path.relative_to(ROOT).as_posix().lower()))]


def test_first_line_says_what_the_file_does() -> None:
    for module in modules():
        says = ast.get_docstring(syntax(module))
        assert says, f"{place(module, 1)}: no module docstring"
        first = says.split("\n\n")[0]
        assert len(first.split()) >= 4 and first.rstrip().endswith("."), f"{place(module, 1)}: no sentence: {first!r}"


def test_native_files_begin_with_what_they_do() -> None:
    for path, text in texts(".cpp", ".h"):
        assert text.startswith("// ") and len(text.splitlines()[0].split()) >= 4, f"{path}: no opening comment"


def test_nothing_is_left_over() -> None:
    # In two halves, so that this file does not find itself.
    words = re.compile("|".join([r"\bTO" r"DO\b", r"\bFIX" r"ME\b", r"\bXX" r"X\b", r"\bHA" r"CK\b", "x" "fail",
                                 r"breakpoint" r"\(", r"\bpdb" r"\b", "<" "<<<<<<", ">" ">>>>>>"]))
    left = [f"{path}:{number}: {line.strip()}" for path, text in texts(*SOURCES)
            for number, line in enumerate(text.splitlines(), 1) if words.search(line)]
    assert not left, "\n".join(left)


def test_no_paths_of_one_machine() -> None:
    found = re.compile(r"/(?:home|root|Users|wo" r"rk)/\w+|/tm" r"p/\w+")
    left = [f"{path}:{number}: {line.strip()}" for path, text in texts(*SOURCES)
            for number, line in enumerate(text.splitlines(), 1) if found.search(line)]
    assert not left, "\n".join(left)


def test_library_names_no_model_family() -> None:
    wrong = []
    for module in (name for name in modules() if not place(name, 1).startswith(NAMES_A_MODEL)):
        wrong += [f"{place(module, node.lineno)}: {node.value!r}" for node in strings(module)
                  if FAMILIES.search(node.value)]
        for node in ast.walk(syntax(module)):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = node.name
            if FAMILIES.search(name):
                wrong.append(f"{place(module, node.lineno)}: {name}")
    assert not wrong, "\n".join(wrong)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_makefile_has_every_target() -> None:
    assert {"demo", "test", "test-all", "check", "bench", "clean"} <= make_targets()


def test_continuous_integration_runs_what_a_newcomer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make test", "make check"} <= set(script.read_text().splitlines())


def test_readme_gives_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert {"make demo", "make test"} <= set(re.findall(r"^\$? ?(make [\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "lowering/INVARIANTS.md"])
def test_documents_tell_the_truth(document: str) -> None:
    """Every make target, linked file, Python block, environment variable and public name in a document is real."""
    path = ROOT / document
    text = path.read_text()
    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b(?=[`\n ])", "\n".join(code_of(text)))) <= make_targets()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), f"{document} links to {link}"
    for named in re.findall(r"`((?:qpass|lowering|kernels|tests|examples)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), f"{document} names {named}"
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    library = "".join(p.read_text() for folder in FOLDERS.values() for p in folder.rglob("*")
                      if p.suffix in {".py", ".cpp", ".h"})
    for variable in set(re.findall(r"\bQPASS_[A-Z_]+\b", text)):
        assert variable in library, f"{document} names {variable}, which nothing reads"
    for name in set(re.findall(r"\bqpass\.([A-Za-z_]+)\b", "\n".join(code_of(text)))):
        known = name in qpass.__all__ or any(m == f"qpass.{name}" for m in modules())
        assert known, f"{document} names qpass.{name}"


def code_of(text: str) -> list[str]:
    """The code of a Markdown document: fenced blocks and spans between backticks."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
