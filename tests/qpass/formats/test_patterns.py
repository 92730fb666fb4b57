"""Patterns from a config: those that name layers match as `re` does, and none takes long."""

from __future__ import annotations

import re

import pytest

from qpass.formats.patterns import matches, pattern_of

NAMES = ("lm_head", "model.layers.3.self_attn.q_proj", "model.layers.17.mlp.experts.5.down_proj", "vision.blocks.0.fc")


@pytest.mark.parametrize("text", [
    r".*lm_head", r"model\.layers\.\d+\.(self_attn|mlp)\..*proj$", r".*\.layers\.(3|17)\..*", r"^(?!.*mlp).*q_proj$",
    r".*experts\.\d+\.(?:gate|up|down)_proj", r"model\.layers\.(\d|1[0-7])\.(.*)\.down_proj", r"(?i:LM_HEAD)", "",
])
def test_ordinary_patterns_match_as_re_does(text: str) -> None:
    assert [matches(text, name) for name in NAMES] == [re.match(text, name) is not None for name in NAMES]


@pytest.mark.parametrize("text", [
    r"(a+)+$", r"(a|a)+$", r"(a|aa)*$", r"((a*)b?)*$", r"(?:(?:a{1,9}){1,9}){1,9}$", r".*.*.*.*.*x", r"(?=(a+)+$)b",
    r"(.{1,9}){20}x", r"(?(1)a|b)(c+)+", "(" * 60 + "a+" + ")+" * 60,
])
def test_patterns_that_can_take_long_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"forever|no regular expression"):
        pattern_of(text)


@pytest.mark.parametrize("text", ["(", "a" * 5000, "[z-a]", "(?P<a>x)(?P<a>y)"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        pattern_of(text)
