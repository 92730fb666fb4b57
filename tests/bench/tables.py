"""Tables: measured cells and goals in, text for a terminal and Markdown out."""

from __future__ import annotations

from collections.abc import Sequence

from cells import Table
from goals import Outcome, outcomes, ratio
from products import Cell
from turns import BUSY_LIMIT, Timing


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width, the first `left` of them left-aligned, a line under the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{text:{'<' if i < left else '>'}{width}}"
                       for i, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def rate(timing: Timing, cell: Cell) -> str:
    """GB/s of weights at up to 16 tokens, TOPS above."""
    assert timing.median_us is not None
    if cell.m <= 16:
        return f"{timing.nbytes / timing.median_us / 1e3:.1f} GB/s"
    return f"{2 * cell.m * sum(cell.n) * cell.k / timing.median_us / 1e6:.2f} TOPS"


def table_text(table: Table, cells: Sequence[Cell]) -> str:
    """One line a cell: the first column's time and rate, then each other column's time and how many times it takes."""
    mine = [cell for cell in cells if cell.table == table.name]
    subject = table.columns[0].label
    shown = [c for c in table.columns[1:] if any(cell.timings[c.label].median_us for cell in mine)]
    rows = [["N x K", "M", subject, "", *(part for c in shown for part in (c.label, ""))]]
    for cell in mine:
        first = cell.timings[subject]
        mark = f" !{cell.others:.1f}" if cell.others > BUSY_LIMIT else ""
        row = [f"{'+'.join(map(str, cell.n))} x {cell.k}", f"{cell.m}{mark}", _time(first),
               rate(first, cell) if first.median_us else ""]
        for column in shown:
            timing, times = cell.timings[column.label], ratio(cell, subject, column.label)
            row += [_time(timing), f"{times:.2f}x" if times else _short(timing)]
        rows.append(row)
    notes = _notes(table, mine)
    return "\n".join([table.name, aligned(rows), *notes])


def goals_text(tables: Sequence[Table], cells: Sequence[Cell]) -> str:
    """One line a goal."""
    found = [(table, outcome) for table in tables for outcome in outcomes(table, cells)]
    return aligned([["goal", "tokens", "beside", "to reach", "lowest", "highest", "result"],
                    *(goal_row(outcome) for _, outcome in found)], left=1) if found else "no goal was measured"


def goal_row(outcome: Outcome) -> list[str]:
    """A goal as cells of a table."""
    numbers = ["" if value is None else f"{value:.2f}x" for value in (outcome.lowest, outcome.highest)]
    return [outcome.text, outcome.tokens, outcome.peer, f"{outcome.goal:.2f}x", *numbers, outcome.mark()]


def _time(timing: Timing) -> str:
    if timing.median_us is None:
        return "-"
    us = timing.median_us
    amount = f"{us:.0f} us" if us < 9999.5 else f"{us / 1e3:.0f} ms"
    return f"{amount} ±{timing.spread:.0f}%"


def _short(timing: Timing) -> str:
    return (timing.why_not or "").partition(":")[0] if (timing.why_not or "").partition(":")[0] in (
        "wrong", "slow", "failed") else ""


def _notes(table: Table, cells: Sequence[Cell]) -> list[str]:
    """A sentence for each column that was not timed somewhere, with its reason."""
    notes = []
    for column in table.columns:
        reasons: dict[str, list[str]] = {}
        for cell in cells:
            if (why := cell.timings[column.label].why_not) is not None:
                reasons.setdefault(why, []).append(f"M={cell.m} {'+'.join(map(str, cell.n))}x{cell.k}")
        for why, where in reasons.items():
            place = "everywhere" if len(where) == len(cells) else where[0] + (" and others" if len(where) > 1 else "")
            notes.append(f"  {column.label} ({place}): {why}")
    return notes
