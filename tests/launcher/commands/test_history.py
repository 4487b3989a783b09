"""Runs of one configuration over time: series, changes, and a real pair of runs, one of them ten per cent slower."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from running import run

from launcher import compare, history

pytestmark = pytest.mark.slow  # the shared fixtures take seconds


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two equal runs of the dummy engine, and one whose steps take 10 % longer."""
    out = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "launcher", "-m", "backend=dummy", "devices=1", "accelerator=cpu"]
    command += [f"output_dir={out}", "measure.repeats=5", "sampling.max_new_tokens=8", "--json"]
    ended = [run([*command, f"backend.step_s={steps}"]) for steps in ("0.05", "0.05,0.08")]
    return [Path(point["run_dir"]) for sweep in ended for point in sweep.last_json["records"]]


def test_the_slower_engine_is_named(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, same, slower = map(str, runs)
    assert compare.main([base, slower, "--fail-if", "itl_s>1.3", "--fail-if", "itl_s>2", "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    [comparison] = line["comparisons"]
    [itl] = [one for one in comparison["figures"] if one["name"] == "itl_s"]
    assert itl["is_different"]
    assert itl["verdict"].endswith(" % longer, outside the spread of both")
    assert comparison["circumstances"] == [{"key": "backend.step_s", "base": 0.05, "other": 0.08}]
    assert [" itl_s is 1." in text for text in line["missed"]] == [True]

    assert compare.main([base, same, "--fail-if", "itl_s>1.3"]) == 0
    printed = capsys.readouterr().out
    assert "what differs" not in printed
    assert "no difference beyond the spread" in printed
    assert compare.main([base, same, "--fail-if", "speed<1"]) == 2
    assert capsys.readouterr().err.startswith("--fail-if: speed is not a figure. HINT: one of new_tokens_per_s, ")


def test_series(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(runs[0].parent)
    assert history.main([folder, "--json"]) == 0
    two, one = json.loads(capsys.readouterr().out)["series"]
    assert [row["run"] for row in two] == [run_dir.name for run_dir in runs[:2]]
    assert (two[0]["verdict"], two[0]["against_previous"], two[0]["differs"]) == ("first", None, [])
    assert two[1]["against_previous"] == pytest.approx(two[1]["new_tokens_per_s"] / two[0]["new_tokens_per_s"])
    assert two[1]["against_median"] == two[1]["against_previous"]
    assert [row["series"] for row in (two[0], one[0])] == ["step_s=0.05", "step_s=0.08"]

    assert history.main([folder, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["verdict"] for row in rows] == ["first", two[1]["verdict"], "first"]
    assert history.main([folder]) == 0
    assert "against the run before" in capsys.readouterr().out


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert history.main([str(tmp_path)]) == 2
    assert capsys.readouterr() == (
        "",
        f"No run that ended well is in {tmp_path}. HINT: python -m launcher, then again\n",
    )
