"""Debug: what QPASS_DEBUG asks for: lines about layers and passes, graphs as Python text before and after each pass.

QPASS_DEBUG=1 one line per layer; =2 also refusals, and count and time of each pass; =3 also numbered dumps in
QPASS_DEBUG_DIR, or ./qpass_debug. Lines go to stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qpass.lowering.graph_nodes import shape_text

_WIDTH = 118  # of a line of graph text


def level() -> int:
    """The value of QPASS_DEBUG, 0 if it is not set or not a number."""
    text = os.environ.get("QPASS_DEBUG", "0")
    return int(text) if text.isdecimal() else 0


def say(needed: int, line: str) -> None:
    """Print `line` if QPASS_DEBUG is at least `needed`."""
    if level() >= needed:
        print(f"qpass: {line}", file=sys.stderr, flush=True)


def graph_text(graph: fx.Graph, name: str = "graph") -> str:
    """The graph as a Python function, one node a line, each with the dtype and shape of its result."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    lines = [line.removeprefix("    ") for line in _folded(f"    def {name}", [node.name for node in inputs])]
    lines[-1] += ":"
    lines += [f"    # {node.name}: {shape_text(node.meta.get('val'))}" for node in inputs]
    for node in graph.nodes:
        if node.op == "get_attr":
            lines.append(f"    {node.name} = self.{node.target}")
        elif node.op == "output":
            lines.append(f"    return {_text(node.args[0])}")
        elif node.op != "placeholder":
            given = [_text(a) for a in node.args] + [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
            start = f'    {node.name}: "{shape_text(node.meta.get("val"))}" = {_callee(node)}'
            lines += _folded(start, given)
    return "\n".join(lines) + "\n"


def _folded(start: str, given: list[str]) -> list[str]:
    """`start(given, ...)` on one line, or on several where that is too long, broken between arguments."""
    line = f"{start}({', '.join(given)})"
    if len(line) <= _WIDTH:
        return [line]
    lines = [f"{start}("]
    for argument in given:
        if len(argument) > _WIDTH - 12 and argument.startswith("["):
            lines += ["        [", *(f"            {part}," for part in argument[1:-1].split(", ")), "        ],"]
        elif lines[-1][:8].isspace() and lines[-1] != "        ]," and len(lines[-1]) + len(argument) < _WIDTH - 2:
            lines[-1] += f" {argument},"
        else:
            lines.append(f"        {argument},")
    return [*lines, "    )"]


def _callee(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return f"self.{target}"
    module = getattr(target, "__module__", "") or ""
    if module.startswith("torch._ops"):
        return f"torch.ops.{target}"
    return f"{module.lstrip('_')}.{getattr(target, '__name__', target)}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_text(part) for part in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, torch.device):
        return f"torch.{value!r}"
    return repr(value) if isinstance(value, str) else str(value)


class Dumps:
    """A folder of numbered graph dumps for one compiled graph; does nothing below QPASS_DEBUG=3."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        if level() < 3:
            return
        root = Path(os.environ.get("QPASS_DEBUG_DIR") or "qpass_debug")
        root.mkdir(parents=True, exist_ok=True)
        number = 0
        while self.folder is None:
            try:
                (root / f"graph_{number:03}").mkdir()
                self.folder = root / f"graph_{number:03}"
            except FileExistsError:
                number += 1
        say(3, f"graphs before and after each pass are in {self.folder}")

    def write(self, number: int, name: str, moment: str, graph: fx.Graph) -> None:
        """Write `<number>.<name>.<moment>.py`."""
        if self.folder is not None:
            text = f'"""{name}, {moment}."""\n\nimport torch\n\n\n{graph_text(graph)}'
            (self.folder / f"{number:02}.{name}.{moment}.py").write_text(text)
