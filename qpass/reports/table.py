"""Table: a plan or a report in; aligned text or an HTML page out, reasons as footnotes."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpass.reports.bands import bands, pattern
from qpass.reports.text_table import Column, human_bytes, text_table

_PLAN: tuple[Column, ...] = (("n", ">"), ("parameter", "<"), ("shape", ">"), ("status", "<"), ("rule", "<"),
                             ("runs as", "<"), ("kernel", "<"), ("before", ">"), ("after", ">"), ("a token", ">"),
                             ("why", "<"))
_REPORT: tuple[Column, ...] = (*_PLAN, ("activation", "<"))
_STATUS = {"quantize": "to quantize", "quantized": "quantized", "keep": "kept in float", "kept": "kept in float",
           "refuse": "refused", "refused": "refused"}
_FOUND = {"trace": "in the graph of one traced forward", "export": "in torch.export's graph",
          "dynamo": "in torch.compile's graphs", "given": "in the graph given",
          "modules": "by walking the modules; there was no graph"}
_STYLE = ("body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
          "td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
          "th{position:sticky;top:0;background:#f4f4f4}.r{text-align:right;white-space:nowrap}")


def render_plan(plan: Any, *, full: bool = False, width: int = 160) -> str:
    """The plan's table; layers that differ only in a number share a line unless `full`."""
    return _render(plan, _PLAN, plan.capture_method, full, width)


def render_report(report: Any, *, full: bool = False, width: int = 160) -> str:
    """The report's table; layers that differ only in a number share a line unless `full`."""
    return _render(report, _REPORT, report.capture, full, width)


def render_html(table: Any, path: Path) -> Path:
    """Write a plan or a report as one self-contained page, a line for every site; returns the path."""
    is_plan = hasattr(table, "capture_method")
    title = "qpass plan" if is_plan else "qpass report"
    columns = _PLAN if is_plan else _REPORT
    told = summary(table.rows, table.notes, table.capture_method if is_plan else table.capture)
    path.write_text(_page(title, told, columns, _cells(table.rows, columns, True, None)), encoding="utf-8")
    return path


def summary(rows: Sequence[Any], notes: Sequence[str], capture: str) -> list[str]:
    """One sentence a line: how many of each status and by which rule, bytes, kernels that refused, notes."""
    lines = []
    for status, words in _STATUS.items():
        by = Counter(row.rule for row in rows if row.status == status)
        if by:
            lines.append(f"{by.total()} {words}: " + ", ".join(f"{n} by {rule}" for rule, n in by.most_common()))
    done = [row for row in rows if row.status in ("quantize", "quantized")]
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    lines.append(f"{human_bytes(before)} -> {human_bytes(after)} in these parameters" + (
        f"; the quantized ones take {bits_per_weight(done):.2f} bits a weight" if done else ""))
    if read := sum(row.bytes_a_token for row in rows):
        lines.append(f"decoding reads {human_bytes(read)} of them a token")
    lines.append(f"layers were found {_FOUND.get(capture, 'by ' + capture)}")
    return lines + [f"not used: {line}" for line in refusal_lines(rows)] + [
        f"note: {note}" for note in notes if note != f"graph: {capture}"]


def bits_per_weight(rows: Sequence[Any]) -> float:
    """Bits that a weight of these rows takes afterwards, scales and zero points included; 0 for no rows."""
    count = 0
    for row in rows:
        size = 1
        for length in row.shape:
            size *= length
        count += size
    return 8.0 * int(sum(row.bytes_after for row in rows)) / max(count, 1)


def refusal_lines(rows: Sequence[Any]) -> list[str]:
    """One line per kernel and sentence, with how many layers it refused."""
    counts = Counter((kernel, sentence) for row in rows for kernel, sentence in row.refusals.items())
    return [f"{kernel}: {sentence} ({count} layer{'s' if count > 1 else ''})"
            for (kernel, sentence), count in counts.items()]


def _render(table: Any, columns: Sequence[Column], capture: str, full: bool, width: int) -> str:
    footnotes: dict[str, int] = {}
    cells = _cells(table.rows, columns, full, footnotes)
    notes = [f"[{number}] {text}" for text, number in footnotes.items()]
    return "\n".join([text_table(columns, cells, width), *notes, "", *summary(table.rows, table.notes, capture)])


def _cells(rows: Sequence[Any], columns: Sequence[Column], full: bool, footnotes: dict[str, int] | None
           ) -> list[list[str]]:
    """A line of cells a row, or a band of rows. Long texts go to `footnotes`, or stay in place if that is None."""
    def noted(text: str, head: str = "") -> str:
        if footnotes is None or not text:
            return text
        return f"{head} [{footnotes.setdefault(text, len(footnotes) + 1)}]".strip()

    cells = []
    for name, group in [(row.name, (row,)) for row in rows] if full else [(b.name, b.rows) for b in bands(rows)]:
        row = group[0]
        line = [str(len(group)), name, "x".join(map(str, row.shape)), row.status, row.rule, row.effective or "float",
                row.kernel or "", human_bytes(sum(r.bytes_before for r in group)),
                _after(group), human_bytes(sum(r.bytes_a_token for r in group)),
                noted(pattern([r.reason for r in group]))]
        if columns is _REPORT:
            text = pattern([r.activation for r in group])
            head = re.split(r"\W", text, maxsplit=1)[0]
            line.append(noted(text, head) if head in ("fused", "shared", "alone") and not full else text)
        cells.append(line)
    return cells


def _after(rows: Sequence[Any]) -> str:
    """Bytes of all rows; of experts also what one of them takes."""
    whole = human_bytes(sum(row.bytes_after for row in rows))
    return f"{whole}, {human_bytes(rows[0].bytes_an_expert)} an expert" if rows[0].bytes_an_expert else whole


def _page(title: str, told: Sequence[str], columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    def cell(tag: str, text: str, align: str) -> str:
        return f"<{tag}{' class=r' if align == '>' else ''}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", heading, align) for heading, align in columns)
    body = "\n".join("<tr>" + "".join(cell("td", text, columns[i][1]) for i, text in enumerate(row)) + "</tr>"
                     for row in rows)
    lines = "\n".join(f"<p>{html.escape(line)}</p>" for line in told)
    return (f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>\n"
            f"<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{lines}\n<table>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{body}\n</tbody></table></html>\n")
