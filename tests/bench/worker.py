"""Worker: serves one library to the coordinator, a JSON line in, a JSON line out; it is idle while others have a turn.

    {"do": "hello"}                                          -> {"versions": {...}, "refuses": {variant: why}}
    {"do": "prepare", "lane": ID, "variant": V, "n": [N, ...], "k": K, "ms": [...], "rotate": BYTES}
                                                             -> {"bytes": BYTES} or {"refused": why}
    {"do": "time", "lane": ID, "m": M, "k": K, "seconds": S} -> {"us": [...], "error": E} or {"wrong": why}
    {"do": "drop"}                                           -> {}      every lane is freed

The rows of every timed call's output that `rows_checked` names are compared with the library's own weights times the
input, in float32.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from lane import Floats, Lane, draw_input, draw_weight, rows_checked

Make = Callable[[Sequence[Floats], int], Lane]
WARM_UP_BELOW_S = 0.05


@dataclass
class Held:
    """A lane in use: its calls and input for each M as they were last made, the outputs they must give, whose turn."""

    lane: Lane
    truth: dict[int, Floats]
    turn: int = 0
    made: dict[int, tuple[Sequence[Callable[[Any], Any]], Any]] = field(default_factory=dict)
    took: dict[int, float] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)


class Refused(Exception):
    """A library cannot run a variant here; the text says why."""


def serve(variants: Mapping[str, Make], versions: Callable[[], Mapping[str, str]],
          refuses: Callable[[], Mapping[str, str]] = dict) -> None:
    """Answer the requests for lanes; `refuses` says of some variants why they cannot be had here."""
    held: dict[str, Held] = {}
    answer_lines(lambda asked: _answer(asked, variants, versions, refuses, held))


def answer_lines(reply: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer on the real stdout, one line a request, until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = reply(json.loads(line))
        except Refused as why:
            answer = {"refused": str(why)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        answers.write(json.dumps(answer) + "\n")


def _answer(asked: dict[str, Any], variants: Mapping[str, Make], versions: Callable[[], Mapping[str, str]],
            refuses: Callable[[], Mapping[str, str]], held: dict[str, Held]) -> dict[str, Any]:
    if asked["do"] == "hello":
        return {"versions": dict(versions()), "refuses": dict(refuses())}
    if asked["do"] == "drop":
        held.clear()
        gc.collect()
        return {}
    if asked["do"] == "prepare":
        lane = variants[asked["variant"]]([draw_weight(n, asked["k"]) for n in asked["n"]], asked["rotate"])
        # A product reads `weight` once; kept are only the outputs, which are small.
        held[asked["lane"]] = Held(lane, {m: draw_input(m, asked["k"])[rows_checked(m)] @ lane.weight.T
                                          for m in asked["ms"]})
        held[asked["lane"]].lane = replace(lane, weight=np.empty((0, 0), np.float32))
        return {"bytes": lane.nbytes}
    return _time(held[asked["lane"]], asked["m"], asked["k"], asked["seconds"])


def _time(held: Held, m: int, k: int, seconds: float) -> dict[str, Any]:
    """Call copies in rotation for about `seconds`, at least once, and compare each output. Once wrong, always wrong."""
    lane, rows = held.lane, rows_checked(m)
    if m in held.wrong:
        return {"wrong": held.wrong[m]}
    if m not in held.made:
        held.made[m] = lane.calls(m), lane.take(draw_input(m, k))
    calls, x = held.made[m]
    together = lane.together(m)
    spans: list[float] = []
    outputs: list[Floats] = []
    if held.took.get(m, 0.0) < WARM_UP_BELOW_S:
        outputs += lane.give(calls[held.turn % len(calls)](x), rows)
        held.turn += 1
    end = time.perf_counter() + seconds
    while not spans or time.perf_counter() < end:
        call = calls[held.turn % len(calls)]
        start = time.perf_counter()
        y = call(x)
        spans.append(time.perf_counter() - start)
        outputs += lane.give(y, rows)
        held.turn += 1
    held.took[m] = min(spans)
    error = max(relative_error(output, held.truth[m]) for output in outputs)
    if not error <= lane.tolerance:
        held.wrong[m] = f"an output was off by {error:.3g} of its norm; {lane.tolerance:.3g} is allowed"
        return {"wrong": held.wrong[m]}
    return {"us": [span / together * 1e6 for span in spans], "error": error}


def relative_error(y: Floats, truth: Floats) -> float:
    """|y - truth| / |truth|, Frobenius; infinite for another shape, for what is not finite, and for a zero output."""
    if y.shape != truth.shape or not np.isfinite(y).all():
        return float("inf")
    return float(np.linalg.norm(y - truth) / np.linalg.norm(truth))
