"""Text table: columns and cells in, aligned text out; and sizes as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

Column = tuple[str, str]  # heading, alignment "<" or ">"

_SEPARATOR = "  "
_LEAST_LAST_COLUMN = 36


def text_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int = 160) -> str:
    """Aligned columns no wider than `width` where that can be; the last column is wrapped to what is left."""
    cells = [[heading for heading, _ in columns], *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    fixed = sum(widths[:-1]) + len(_SEPARATOR) * (len(columns) - 1)
    widths[-1] = max(min(widths[-1], max(_LEAST_LAST_COLUMN, width - fixed)), len(columns[-1][0]))
    lines = []
    for number, row in enumerate(cells):
        for i, tail in enumerate(textwrap.wrap(row[-1], widths[-1], break_on_hyphens=False) or [""]):
            parts = [*row[:-1], tail] if i == 0 else [*[""] * (len(row) - 1), tail]
            lines.append(_SEPARATOR.join(f"{part:{columns[c][1]}{widths[c]}}" for c, part in enumerate(parts)).rstrip())
        if number == 0:
            lines.append(_SEPARATOR.join("-" * w for w in widths))
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """`540 B`, `1.5 KiB`, `269.1 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
