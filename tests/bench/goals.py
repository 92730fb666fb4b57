"""Goals: measured cells in, for each goal how far it was reached, where, and why it could not be measured out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cells import Goal, Table
from products import Cell


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One goal: its lowest and highest ratio over the shapes and tokens, or why there is none."""

    text: str
    peer: str
    tokens: str
    goal: float
    lowest: float | None = None
    highest: float | None = None
    cells: int = 0
    reached_in: int = 0
    why_not: str | None = None

    @property
    def reached(self) -> bool | None:
        """None if it could not be measured."""
        return None if self.lowest is None else self.reached_in == self.cells

    def mark(self) -> str:
        """`reached`, `reached in 3 of 5`, or why it was not measured."""
        if self.reached is None:
            return f"not measured: {self.why_not}"
        return "reached" if self.reached else f"reached in {self.reached_in} of {self.cells}"


def ratio(cell: Cell, subject: str, peer: str) -> float | None:
    """How many times the speed of `peer` the subject has; None if one of them was not timed."""
    ours, theirs = cell.timings[subject].median_us, cell.timings[peer].median_us
    return theirs / ours if ours and theirs else None


def outcomes(table: Table, cells: Sequence[Cell]) -> list[Outcome]:
    """One for each of the table's goals whose tokens were asked for."""
    mine = [cell for cell in cells if cell.table == table.name]
    return [_outcome(goal, [cell for cell in mine if cell.m in goal.tokens]) for goal in table.goals
            if any(cell.m in goal.tokens for cell in mine)]


def _outcome(goal: Goal, cells: Sequence[Cell]) -> Outcome:
    ratios = [found for cell in cells if (found := ratio(cell, goal.subject, goal.peer)) is not None]
    words = ", ".join(map(str, sorted({cell.m for cell in cells})))
    known = {"text": goal.subject, "peer": goal.peer, "tokens": words, "goal": goal.ratio}
    if not ratios:
        reasons = [cell.timings[label].why_not for cell in cells for label in (goal.subject, goal.peer)]
        return Outcome(**known, why_not=next(filter(None, reasons), "nothing was timed"))  # type: ignore[arg-type]
    return Outcome(**known, lowest=min(ratios), highest=max(ratios), cells=len(ratios),  # type: ignore[arg-type]
                   reached_in=sum(found >= goal.ratio for found in ratios))
