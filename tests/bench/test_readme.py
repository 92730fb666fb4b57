"""README.md shows the numbers of the last run that is kept, and no others."""

from __future__ import annotations

import pytest
from readme import BEGIN, END, README, section, written


def test_readme_agrees_with_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert written(text, section()) == text, "write it anew: python tests/bench/readme.py"


def test_marks_are_needed() -> None:
    assert written(f"a\n{BEGIN}\nold\n{END}\nz\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nz\n"
    with pytest.raises(ValueError, match="once"):
        written("no marks", "new")
