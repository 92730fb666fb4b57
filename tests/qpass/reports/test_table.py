"""Table: layers of one pattern share a line, reasons become footnotes, pages escape what they show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from expecttest import assert_expected_inline

from qpass.reports.bands import bands, pattern
from qpass.reports.table import bits_per_weight, refusal_lines, render_html, render_plan, render_report
from qpass.reports.text_table import human_bytes, text_table
from qpass.rows import PlanRow, ReportRow


def row(name: str, **fields: object) -> PlanRow:
    facts = {"kind": "linear", "shape": (576, 576), "status": "quantize", "rule": "recipe w4a8", "scheme": "w4a8",
             "effective": "w4a8 g64", "group_size": 64, "kernel": "linear_k", "bytes_before": 663552,
             "bytes_after": 176256, "bytes_a_token": 176256,
             "reason": "group 128 does not divide 576: adjusted to 64", **fields}
    return PlanRow(name=name, **facts)  # type: ignore[arg-type]


ROWS = [
    row("embed.weight", kind="embedding", status="keep", effective=None, kernel=None, bytes_after=663552,
        bytes_a_token=1152,
        reason="embeddings are looked up"),
    *(row(f"layers.{i}.{leaf}.weight", shared_input=i, produced_by=f"layers.{i}.norm (Norm)",
          refusals={"linear_amx": "needs amx_int8"}) for i in range(3) for leaf in ("q", "k")),
    row("head.weight", status="keep", rule="ignore <head>", effective=None, kernel=None, bytes_after=663552,
        bytes_a_token=663552, reason=""),
]


def test_plan_table() -> None:
    plan = SimpleNamespace(rows=ROWS, notes=("graph: trace",), capture_method="trace")
    assert_expected_inline(render_plan(plan), """\
n  parameter                 shape  status    rule           runs as   kernel       before      after    a token  why
-  ----------------------  -------  --------  -------------  --------  --------  ---------  ---------  ---------  ---
1  embed.weight            576x576  keep      recipe w4a8    float               648.0 KiB  648.0 KiB    1.1 KiB  [1]
3  layers.{0..2}.q.weight  576x576  quantize  recipe w4a8    w4a8 g64  linear_k    1.9 MiB  516.4 KiB  516.4 KiB  [2]
3  layers.{0..2}.k.weight  576x576  quantize  recipe w4a8    w4a8 g64  linear_k    1.9 MiB  516.4 KiB  516.4 KiB  [2]
1  head.weight             576x576  keep      ignore <head>  float               648.0 KiB  648.0 KiB  648.0 KiB
[1] embeddings are looked up
[2] group 128 does not divide 576: adjusted to 64

6 to quantize: 6 by recipe w4a8
2 kept in float: 1 by recipe w4a8, 1 by ignore <head>
5.1 MiB -> 2.3 MiB in these parameters; the quantized ones take 4.25 bits a weight
decoding reads 1.6 MiB of them a token
layers were found in the graph of one traced forward
not used: linear_amx: needs amx_int8 (6 layers)""")


def test_full_table_gives_every_layer_a_line() -> None:
    plan = SimpleNamespace(rows=ROWS, notes=(), capture_method="trace")
    text = render_plan(plan, full=True)
    assert all(r.name in text for r in ROWS) and ".." not in text.split("\n\n")[0]


def test_report_table_ends_with_the_activation() -> None:
    rows = [ReportRow(name=f"layers.{i}.q.weight", kind="linear", shape=(4, 4), status="quantized", rule="recipe w4a8",
                      kernel="k", activation=f"fused into layers.{i}.norm") for i in range(2)]
    rows += [replace(rows[0], name="head.weight", activation="in the kernel")]
    report = SimpleNamespace(rows=rows, notes=(), capture="trace")
    lines = render_report(report).splitlines()
    assert lines[0].split()[-1] == "activation" and lines[2].endswith("fused [1]")
    assert lines[3].endswith("in the kernel")
    assert "layers.{0,1}.q.weight" in lines[2] and lines[4] == "[1] fused into layers.{0,1}.norm"
    full = render_report(report, full=True)
    assert "fused into layers.0.norm" in full and "fused into layers.1.norm" in full and "[1]" not in full


def test_a_page_holds_every_row_and_escapes(tmp_path: Path) -> None:
    plan = SimpleNamespace(rows=ROWS, notes=("a <b> & c",), capture_method="trace")
    page = render_html(plan, tmp_path / "plan.html").read_text()
    assert page.count("<tr>") == 1 + len(ROWS) and "qpass plan" in page
    assert "ignore &lt;head&gt;" in page and "a &lt;b&gt; &amp; c" in page and "<head>" not in page
    assert page.count("group 128 does not divide 576: adjusted to 64") == 6
    assert "src=" not in page and "href=" not in page
    report = render_html(SimpleNamespace(rows=[], notes=(), capture="trace"), tmp_path / "report.html").read_text()
    assert "qpass report" in report and "activation" in report


def test_rows_that_differ_are_not_one_band() -> None:
    rows = [row("l.0.q"), row("l.1.q", rule="l.1.q = w4a8"), row("l.2.q"), row("l.3.q", reason="")]
    assert [(b.name, len(b.rows)) for b in bands(rows)] == [("l.{0,2}.q", 2), ("l.1.q", 1), ("l.3.q", 1)]
    assert sum(b.bytes_before for b in bands(rows)) == 4 * 663552
    assert sum(b.bytes_after for b in bands(rows)) == 4 * 176256


def test_two_indices_share_a_line_only_if_every_pair_is_there() -> None:
    full = [row(f"l.{i}.e.{j}.w") for i in range(2) for j in range(3)]
    assert [b.name for b in bands(full)] == ["l.{0,1}.e.{0..2}.w"]
    assert [b.name for b in bands(full[:-1])] == ["l.{0,1}.e.0.w", "l.{0,1}.e.1.w", "l.0.e.2.w"]


@pytest.mark.parametrize(("names", "text"), [
    (["a.1.b"], "a.1.b"), (["a.1", "a.2", "a.3", "a.7"], "a.{1..3,7}"), (["0.w", "1.w"], "{0,1}.w"),
    (["l1.w", "l1.w"], "l1.w"), (["a.2.w", "a.10.w"], "a.{2,10}.w"),
], ids=str)
def test_pattern(names: list[str], text: str) -> None:
    assert pattern(names) == text


def test_text_table_wraps_the_last_column_only() -> None:
    text = text_table([("a", "<"), ("b", ">"), ("why", "<")], [["x", "1", "word " * 20], ["long", "22", ""]], width=50)
    lines = text.splitlines()
    assert lines[0] == "a      b  why" and lines[-1] == "long  22"
    assert max(map(len, lines)) <= 50 and len(lines) > 4
    assert all(line.startswith(" " * 10) for line in lines[3:-1])


def test_sizes() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30, 2 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB", "2.0 TiB"]


def test_bits_and_refusals() -> None:
    assert bits_per_weight([]) == 0
    assert bits_per_weight(ROWS[1:3]) == 8 * 176256 / 576 ** 2
    assert refusal_lines(ROWS) == ["linear_amx: needs amx_int8 (6 layers)"]
    assert refusal_lines([replace(ROWS[1])]) == ["linear_amx: needs amx_int8 (1 layer)"]
