"""The page's tables are what the CSV files hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.interleaved import ROOT, Report

PAGE = """# Page

<!-- table: net: forward, a -->
old
<!-- end -->
between
<!-- table: net: * -->
<!-- end -->
<!-- table: net: machine -->
<!-- end -->
<!-- table: plain -->
<!-- end -->
<!-- table: other: x -->
as it was
<!-- end -->
"""


def _write(folder: Path) -> None:
    report = Report({"processor": "P: 2", "system": "S"}, folder / "net.csv")
    row = {"case": "ours | x", "s": 0.123456, "/ y": 0.41, "/ y target": 0.4, "/ y reached": False, "n": 12345}
    report.table("forward, a", [row, {"case": "plain", "s": 12345.6, "/ y": 1.0, "/ y target": None}], "a note")
    report.table("forward, b", [{"part": "  of it", "peak MB": 1.5, "empty": None}])
    (folder / "plain.csv").write_text("data,AP\nval,0.743123\n")


def test_blocks_are_replaced_and_only_they(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    tables.main([str(page), str(tmp_path / "net.csv"), str(tmp_path / "plain.csv")])
    text = page.read_text()
    first, rest = text.split("between\n")
    assert first == (
        "# Page\n\n<!-- table: net: forward, a -->\n\n"
        "| case | s | / y | n |\n|---|---:|---:|---:|\n"
        "| ours \\| x | 0.123 | 0.41 (target 0.4, missed) | 12345 |\n| plain | 12346 | 1 |  |\n"
        "\na note\n\n<!-- end -->\n"
    )
    assert "**forward, a**\n\n| case" in rest
    assert "**forward, b**\n\n| part | peak MB |\n|---|---:|\n| of it | 1.5 |\n" in rest
    assert "- processor: P: 2\n- system: S\n" in rest
    assert "| data | AP |\n|---|---:|\n| val | 0.7431 |\n" in rest
    assert rest.endswith("<!-- table: other: x -->\nas it was\n<!-- end -->\n")
    said = capsys.readouterr().err
    assert "other: x" in said and "in no block" not in said
    # Once more changes nothing, and a table that the page does not show is named.
    tables.main([str(page), str(tmp_path / "net.csv"), str(tmp_path / "plain.csv")])
    assert page.read_text() == text
    assert tables.fill("", {"net": tables.Results.read(tmp_path / "net.csv")})[2] == [
        "net: forward, a",
        "net: forward, b",
    ]


@pytest.mark.parametrize(
    "page", ["<!-- table: a -->\n", "<!-- end -->\n", "<!-- table: a -->\n<!-- table: b -->\n<!-- end -->\n"]
)
def test_a_marker_without_its_other_half_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="has no `<!-- end -->`"):
        tables.fill(page, {})


def test_the_page_names_commands_that_exist() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    _, missing, _ = tables.fill(page, {})
    assert len(missing) > 10
    for text in (page, (ROOT / "benchmarks" / "README.md").read_text()):
        modules = re.findall(r"python -m benchmarks\.(\w+)", text)
        assert len(modules) > 8
        assert all((ROOT / "benchmarks" / f"{module}.py").exists() for module in modules)
