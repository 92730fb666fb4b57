"""Stand-ins: modules and other forwards for them in; within the context they answer in place of the modules' own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def standing_in(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within, each module runs the forward given for it; afterwards what it ran before, whatever happened."""
    with ExitStack() as undo:
        for module, forward in forwards:
            if "forward" in module.__dict__:
                undo.callback(module.__dict__.__setitem__, "forward", module.__dict__["forward"])
            else:
                undo.callback(module.__dict__.pop, "forward")
            module.__dict__["forward"] = forward
        yield
