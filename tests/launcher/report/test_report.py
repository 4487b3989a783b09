"""`python -m launcher.report`: rows in machine-readable formats, and a page in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
from browser import browser, missing, serving
from running import ROOT, launcher, run

from launcher.report.page.figures import Point, Span, merged_spans, pareto_front
from launcher.report.rows import markdown_text

pytestmark = pytest.mark.slow  # the shared fixtures take seconds

POINTS = ("-m", "backend=dummy", "backend.step_s=0.001,0.002", "devices=1,2", "accelerator=cpu")
TABLES = "return [...document.querySelectorAll('section')].map(s => s.querySelector('h2').innerText)"
WIDE = """
const page = document.documentElement;
const hidden = [...document.querySelectorAll('h1,h2,p,figcaption,svg')].filter(part => {
  const box = part.getBoundingClientRect();
  return box.width < 50 || box.height < 5 || box.right > window.innerWidth + 1;
});
const sizes = [...document.querySelectorAll('p')].map(part => parseFloat(getComputedStyle(part).fontSize));
return [page.scrollWidth <= window.innerWidth, hidden.length, Math.min(...sizes)];
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of a sweep over two keys."""
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    assert launcher(*POINTS, f"output_dir={folder}").code == 0
    return folder


def report(*arguments: object) -> tuple[int, str, str]:
    ended = run([sys.executable, "-m", "launcher.report", *map(str, arguments)])
    return ended.code, ended.out, ended.err


def test_rows_have_every_swept_key_and_the_same_figures_in_each_form(runs: Path) -> None:
    code, out, _ = report(runs, "--json")
    rows = json.loads(out)
    assert code == 0
    assert {(row["backend.step_s"], row["devices"]) for row in rows} == {(s, d) for s in (0.001, 0.002) for d in (1, 2)}
    code, out, _ = report(runs, "--csv")
    assert code == 0
    read = list(csv.DictReader(io.StringIO(out)))
    assert [float(row["new_tokens_per_s"]) for row in read] == [row["new_tokens_per_s"] for row in rows]
    code, out, _ = report(runs)
    assert (code, out) == (0, markdown_text(rows))
    (sweep,) = runs.glob("*_sweep")
    assert json.loads((sweep / "sweep.json").read_text()) == rows
    assert list(csv.DictReader((sweep / "sweep.csv").open())) == read
    code, out, _ = report(sweep, "--json")
    assert (code, json.loads(out)) == (0, rows)


def test_the_page_in_a_browser(runs: Path, tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    figures = tmp_path / "figures"
    code, out, err = report(runs, "--html", tmp_path / "page.html", "--figures", figures, "--format=svg,png")
    assert (code, out) == (0, "")
    assert "wrote 6 figures" in err
    assert sorted(path.stem for path in figures.glob("*.png")) == [
        "latency", "memory", "pareto", "scaling", "speed", "timeline",
    ]  # fmt: skip
    text = (tmp_path / "page.html").read_text()
    assert len(text) < 400_000
    assert "<script" not in text
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", text) == []
    with serving(tmp_path) as (address, asked), browser() as window:
        for width in (400, 1600):
            window.open(f"{address}/page.html", width)
            assert window.evaluate(WIDE) == [True, 0, 16], width
            assert window.evaluate("return document.querySelectorAll('svg title').length") == 6
            titles = window.evaluate(TABLES)
            badges = window.evaluate("return [...document.querySelectorAll('td')].map(cell => cell.innerText)")
            assert sum(badge.startswith(("VALID", "INVALID (")) for badge in badges) == 4
            assert titles == [
                "Runs", "Speed", "Latency", "Memory of each device", "Timeline", "Scaling efficiency",
                "One user against all",
            ]  # fmt: skip
        assert window.errors() == []
        assert set(asked) == {"/page.html"}


def test_the_example_in_the_documentation() -> None:
    page, picture = ROOT / "docs" / "example_report.html", ROOT / "docs" / "example_report.png"
    assert page.stat().st_size < 400_000
    assert picture.stat().st_size < 150_000
    assert "<script" not in page.read_text()
    if missing() is None:
        with serving(page.parent) as (address, asked), browser() as window:
            for width in (400, 1600):
                window.open(f"{address}/{page.name}", width)
                assert window.evaluate(WIDE) == [True, 0, 16], width
            assert window.errors() == []
            assert set(asked) == {f"/{page.name}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "/no/such/folder is not a folder. HINT: "),
        (["RUNS", "--figures=x", "--format=gif"], "--format=gif is not known. HINT: --format=svg,png,pdf"),
        (["RUNS", "--html=/proc/none/page.html"], "Cannot write /proc/none"),
        (["EMPTY"], "No run with a record is in "),
    ],
)
def test_wrong_arguments_are_one_line(runs: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"RUNS": str(runs), "EMPTY": str(tmp_path)}
    code, out, err = report(*(places.get(word, word) for word in arguments))
    assert (code, out, err[: len(message)], err.count("\n")) == (2, "", message, 1)


def test_the_pareto_front_is_what_no_other_point_beats() -> None:
    points = [Point("a", 1, 10), Point("b", 2, 8), Point("c", 1.5, 5), Point("d", 2, 7)]
    assert [point.name for point in pareto_front(points) if point.on_front] == ["a", "b"]


def test_many_spans_are_merged_and_keep_their_extent() -> None:
    spans = [Span("rank 0", i * 0.01, i * 0.01 + 0.009, "decode") for i in range(5000)]
    merged = merged_spans(spans, most=2000)
    assert len(merged) <= 2000
    assert (merged[0].start, merged[-1].end) == (0, pytest.approx(49.999))
