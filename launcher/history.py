"""`python -m launcher.history FOLDER...`: runs of one configuration over time, each against those before it.

Each run is a row, oldest first: new tokens/s with the spread of the repeats, the change from the previous run and from
the median of all previous ones, and all other differences from the previous run (versions, commit, driver, host). Runs
with different configurations are separate series. --json and --csv are for programs.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.config.values import flat
from launcher.report.layout import console, fitted
from launcher.report.rows import csv_text, label_of, swept_keys
from launcher.report.units import rate
from launcher.results.changes import change_of, other_circumstances, repeated
from launcher.run_dir.lifecycle import what_is_run
from launcher.run_dir.run_dir import RunDir, run_dirs_in
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from rich.console import Console

    from launcher.results.record import Record

FIGURE = "new_tokens_per_s"
MOST_NAMED = 3
"""The most differences from the previous run that the table names; the JSON has all."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One run of a series, compared with the previous run and the median of all previous ones (None for the first)."""

    series: str
    run: str
    started_at: float | None
    commit: str | None
    new_tokens_per_s: float
    min: float
    max: float
    against_previous: float | None = None
    verdict: str = "first"
    against_median: float | None = None
    differs: tuple[str, ...] = ()


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(
        prog="python -m launcher.history", description=(__doc__ or "").partition("\n\n")[0].partition(": ")[2]
    )
    parser.add_argument("folders", type=Path, metavar="FOLDER", nargs="+", help="folders of runs, as runs is")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="print the series as JSON")
    kind.add_argument("--csv", action="store_true", help="print a row for each run as CSV")
    return parser.parse_intermixed_args(argv)


def read_measured(folders: Sequence[Path]) -> list[Record]:
    """The records of all successful runs in the folders, by start time; UserError if there is none.

    Prints a line on stderr for each record that cannot be read.
    """
    records = []
    for folder in folders:
        run_dirs = run_dirs_in(folder)
        if RunDir(folder).has_record():
            run_dirs = [RunDir(folder)]
        for run_dir in run_dirs:
            try:
                record = run_dir.read_record()
            except UserError as error:
                print(f"note: left out: {error.fact}", file=sys.stderr)
                continue
            if record is not None and record.status == "ok" and FIGURE in repeated(record):
                records.append(record)
    if not records:
        raise UserError(
            f"No run that ended well is in {', '.join(map(str, folders))}.", "python -m launcher, then again"
        )
    return sorted(records, key=lambda record: record.started_at or 0.0)


def series_of(records: Sequence[Record]) -> list[list[Record]]:
    """The records grouped by configuration and number of devices, in the order of their first runs."""
    series: dict[str, list[Record]] = {}
    for record in records:
        key = json.dumps([record.num_devices, flat(what_is_run(record.config))], sort_keys=True)
        series.setdefault(key, []).append(record)
    return list(series.values())


def moments(name: str, records: Sequence[Record]) -> list[Moment]:
    """The rows of a series."""
    rows: list[Moment] = []
    previous: Record | None = None
    for record in records:
        values, commit = repeated(record)[FIGURE], None
        if record.environment and record.environment.git:
            commit = record.environment.git.commit[:12]
        row = Moment(
            series=name,
            run=Path(record.run_dir or "-").name,
            started_at=record.started_at,
            commit=commit,
            new_tokens_per_s=statistics.median(values),
            min=min(values),
            max=max(values),
        )
        if previous is not None:
            change = change_of(FIGURE, repeated(previous)[FIGURE], values)
            row = replace(
                row,
                against_previous=change.ratio,
                verdict=change.verdict,
                against_median=row.new_tokens_per_s / statistics.median(before.new_tokens_per_s for before in rows),
                differs=tuple(circumstance.key for circumstance in other_circumstances(previous, record)),
            )
        rows.append(row)
        previous = record
    return rows


def show(rows: Sequence[Moment], out: Console) -> None:
    """Print one series."""
    cells = []
    for row in rows:
        moment = ratio = "-"
        if row.started_at:
            moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.started_at))
        if row.against_median is not None:
            ratio = f"{row.against_median:.3f}"
        named = ", ".join(row.differs[:MOST_NAMED])
        if len(row.differs) > MOST_NAMED:
            named += " …"
        speeds = (rate(row.new_tokens_per_s), f"{rate(row.min)} … {rate(row.max)}")
        cells.append([moment, row.commit or "-", *speeds, row.verdict, ratio, escape(named)])
    columns = (
        "started", "commit", "new tokens/s", "min … max", "against the run before", "of the median before",
        "also differs",
    )  # fmt: skip
    texts = ("against the run before", "also differs")
    optional = ("commit", "also differs", "min … max")
    out.print(fitted(out, columns, cells, texts=texts, optional=optional, title=escape(rows[0].series)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 with one line on stderr for a mistake that the user can fix."""
    try:
        arguments = parse(argv)
        series = series_of(read_measured(arguments.folders))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    swept = swept_keys([records[0] for records in series])
    tables = [moments(label_of(records[0], swept), records) for records in series]
    if arguments.json:
        print(json.dumps({"series": [[asdict(row) for row in rows] for rows in tables]}))
    elif arguments.csv:
        rows = [asdict(row) for table in tables for row in table]
        print(csv_text([row | {"differs": "; ".join(row["differs"])} for row in rows]), end="")
    else:
        for table in tables:
            show(table, console())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
