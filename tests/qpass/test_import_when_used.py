"""Import when used: a package is executed at its first use, whole and once, and is the one that everybody then sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qpass.import_when_used import import_when_used


@pytest.fixture
def said(tmp_path: Path) -> object:
    """Runs lines in a new interpreter, with a package `heavy` that prints when it is executed; returns the output."""
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("print('executed')\nfrom heavy.part import three\nfour = 4\n")
    (tmp_path / "heavy" / "part.py").write_text("import heavy\nthree = 3\nprint('part')\n")
    (tmp_path / "broken.py").write_text("raise ImportError('no library')\n")

    def run(*lines: str) -> list[str]:
        code = "\n".join((f"import sys; sys.path.insert(0, {str(tmp_path)!r})",
                          "from qpass.import_when_used import import_when_used", *lines))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).splitlines()

    return run


@pytest.mark.parametrize(("use", "shown"), [
    ("pass", []), ("heavy.__name__, heavy.__file__", []), ("print(heavy.four)", ["executed", "part", "4"]),
    ("print(heavy.three, heavy.four)", ["executed", "part", "3 4"]),
    ("from heavy import four; print(four)", ["executed", "part", "4"]),
    ("import heavy.part; print(heavy.part.three)", ["executed", "part", "3"]),
    ("from heavy.part import three; print(three)", ["executed", "part", "3"]),
    ("heavy.four; print(sys.modules['heavy'] is heavy, type(heavy).__name__)", ["executed", "part", "True module"]),
])
def test_what_counts_as_a_use(said, use: str, shown: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert said("import_when_used('heavy')", "import heavy", use) == shown


def test_what_is_wrong_with_a_package_is_said_where_it_is_used(said) -> None:  # type: ignore[no-untyped-def]
    shown = said("import_when_used('heavy', 'broken')", "import broken, heavy", "print('here')", "broken.anything")
    assert shown[0] == "here" and shown[-1] == "ImportError: no library"
    shown = said("import_when_used('heavy')", "import heavy", "heavy.five")
    assert shown[-1].startswith("AttributeError: module 'heavy' has no attribute 'five'")


def test_packages_that_are_here_or_nowhere_are_left_alone() -> None:
    before, finders = dict(sys.modules), list(sys.meta_path)
    import_when_used("pytest", "no_such_package_anywhere")
    sys.meta_path[:] = finders
    assert sys.modules["pytest"] is before["pytest"] and "no_such_package_anywhere" not in sys.modules
