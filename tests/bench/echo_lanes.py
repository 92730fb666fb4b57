"""Lanes of nothing: a peer for the tests of the harness, right, wrong, refusing, raising or dying on request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import numpy as np
from lane import Floats, Lane, copies_for, few_or_all
from worker import Refused, serve


def lane(name: str, weights: Sequence[Floats], rotate: int) -> Lane:
    if name == "refuses":
        raise Refused("it is made of paper")
    if name == "dies":
        os._exit(3)
    weight = np.concatenate(weights)
    state = {"calls": 0}

    def call(x: Floats) -> Floats:
        state["calls"] += 1
        if name == "raises":
            raise ValueError("no")
        y = x @ weight.T
        # One output in the middle of the run is another one's.
        return np.zeros_like(y) if name == "wrong" and state["calls"] == 3 else np.asarray(y)

    print("a library that chatters on stdout")
    return Lane(calls=few_or_all([call] * copies_for(weight.nbytes, rotate)), take=np.array,
                give=lambda y, rows: [y[rows]], weight=weight, nbytes=weight.nbytes, tolerance=1e-3)


if __name__ == "__main__":
    serve({name: partial(lane, name) for name in ("right", "wrong", "refuses", "raises", "dies")},
          lambda: {"echo": "1"}, lambda: {"never": "it needs a moon"})
