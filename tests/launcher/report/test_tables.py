"""The tables of one run."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from running import ROOT

from launcher.report.rows import rows_of
from launcher.report.run.tables import json_line, show_record
from launcher.report.sweep_table import show_sweep
from launcher.results.figures import metrics
from launcher.results.measured import Speculation, Spread
from launcher.results.record import Record, RunError, read_record
from launcher.status import history

RECORD = read_record(json.loads((ROOT / "tests" / "records" / "version_1.json").read_text()))


def printed(record: Record) -> str:
    out = Console(file=io.StringIO(), width=140)
    show_record(record, out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_counter_of_an_engine_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.COUNTERS, "accepted_tokens", "accepted draft tokens")
    assert RECORD.metrics is not None
    counters = {"accepted_tokens": Spread(1234, 8, 99999, (1234, 8, 99999))}
    record = replace(RECORD, run_dir=str(tmp_path), metrics=replace(RECORD.metrics, counters=counters))
    [row] = [line for line in printed(record).splitlines() if "accepted draft tokens" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "accepted draft tokens", "1,234", "8", "99,999", "1 repeat",
    ]  # fmt: skip


def test_guesses_have_one_row_and_a_column_among_runs(tmp_path: Path) -> None:
    assert RECORD.metrics is not None
    held, tokens, share = (Spread(value, value, value, (value,)) for value in (0.736, 3.598, 0.5))
    metrics_of_it = replace(RECORD.metrics, speculation=Speculation(held, tokens, share))
    record = replace(RECORD, run_dir=str(tmp_path), metrics=metrics_of_it)
    [row] = [line for line in printed(record).splitlines() if "accepted guesses" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "accepted guesses", "73.6%", "73.6%", "73.6%", "3.60 tokens a step, guessing takes 50.0%",
    ]  # fmt: skip
    out = Console(file=io.StringIO(), width=240)
    show_sweep([RECORD, record], [{"speculative": "none"}, {"speculative": "draft"}], out)
    out.print(history(["a", "b"], [RECORD, record], ["", ""], out))
    assert isinstance(out.file, io.StringIO)
    shown = out.file.getvalue().splitlines()
    assert sum("accepted guesses" in line for line in shown) == 2
    assert sum("73.6%, 3.60 tokens a step" in line for line in shown) == 2
    assert rows_of([RECORD, record])[1]["tokens_per_step"] == 3.598


def test_the_json_line_names_ranks_devices_and_batch() -> None:
    line = json_line(replace(RECORD, world_size=1))
    assert (line["world_size"], line["num_devices"], line["batch_size"]) == (1, 2, 4)
    assert "error" not in line
    failed = replace(RECORD, error=RunError(1, "load", "E", "m", traceback="Traceback"))
    assert json_line(failed)["error"] == {"rank": 1, "stage": "load", "type": "E", "message": "m", "hint": ""}
