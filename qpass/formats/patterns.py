"""Patterns: a regular expression out of a checkpoint's config in; whether a layer's name matches out, in bounded time.

A checkpoint comes from a stranger, and Python's `re` can search for ages: `(a+)+$` in thirty letters and a digit.
Patterns that name layers need little, so what could take long is refused: repeats inside a repeat, and many open ones.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from typing import Any

_MOST_CHARACTERS, _MOST_REPEATS, _LONGEST_NAME = 2000, 4, 512
_parser: Any = import_module("re._parser")  # the tree of a pattern, as `re` itself reads it
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


@lru_cache(maxsize=1024)
def pattern_of(text: str) -> re.Pattern[str]:
    """The compiled pattern. Raises ValueError if it is none, or if matching it could take long."""
    if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
        raise ValueError(f"a pattern of layers' names in the config is no text of up to {_MOST_CHARACTERS} "
                         f"characters: {str(text)[:60]!r}")
    try:
        tree, compiled = _parser.parse(text), re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {text!r} in the config is no regular expression: {error}") from error
    if _repeats(tree, inside=False) > _MOST_REPEATS:
        raise ValueError(f"the pattern {text!r} in the config has more than {_MOST_REPEATS} open repeats, or "
                         "repeats a repeat or a choice: it can take forever on a long name; write the names out")
    return compiled


def matches(text: str, name: str) -> bool:
    """Whether `name`, of which 512 characters count, begins with what the pattern says. Raises as pattern_of."""
    return pattern_of(text).match(name[:_LONGEST_NAME]) is not None


def _repeats(tree: Any, inside: bool) -> int:
    """How many open repeats there are; one inside a repeat, or a choice there, counts as too many."""
    found = 0
    for operation, argument in tree:
        name = str(operation)
        if inside and (name == "BRANCH" or (name in _REPEATS and argument[1] != 1)):
            return _MOST_REPEATS + 1
        if name in _REPEATS:
            least, most, body = argument
            opened = most > 1 and least != most
            found += int(opened) + _repeats(body, inside or most > 1)
        else:
            found += sum(_repeats(part, inside) for part in _parts(argument))
    return found


def _parts(argument: Any) -> list[Any]:
    """The trees within one operation's argument, however deep it keeps them."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [part for item in argument for part in _parts(item)]
    return []
