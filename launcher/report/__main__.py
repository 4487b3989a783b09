"""`python -m launcher.report RUN|FOLDER...`: runs as a page, as figures, or as a table for other programs."""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.report.page.document import page
from launcher.report.rows import JSON, csv_text, markdown_text, rows_of
from launcher.run_dir.run_dir import RunDir, run_dirs_in
from launcher.run_dir.typed_files import read_typed
from launcher.run_dir.verify import references_in, verdict_of
from launcher.system.files import write_text
from launcher.system.terminal import Parser, run_command
from launcher.version import __version__
from shards.errors import UserError
from shards.machine.interpreter import pip_install

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from launcher.results.record import Record

FORMATS = ("svg", "png", "pdf")


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a sweep, as read from its file."""

    run_dir: str | None


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(prog="python -m launcher.report", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("paths", type=Path, metavar="PATH", nargs="+", help="runs, sweeps, or folders of runs")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write one self-contained page")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write each figure as files")
    parser.add_argument("--format", default="svg", metavar="svg,png,pdf", help="formats of --figures (default: svg)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--csv", action="store_true", help="print a row for each run as CSV")
    kind.add_argument("--json", action="store_true", help="print the rows as JSON")
    kind.add_argument("--markdown", action="store_true", help="print the rows as Markdown (the default)")
    return parser.parse_intermixed_args(argv)


def read_runs(paths: Sequence[Path]) -> list[tuple[RunDir, Record]]:
    """All runs below the paths that have a record, with their records; in a folder of runs sorted by start time.

    UserError if there is none.
    """
    runs: list[tuple[RunDir, Record]] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder.", "the folder of a run, of a sweep, or of several runs: runs")
        recorded = []
        for one in runs_in(path):
            record = one.read_record()
            if record is None:
                print(f"note: {one} has no record yet, and is left out", file=sys.stderr)
            else:
                recorded.append((one, record))
        if not (path / JSON).is_file():  # a refused run has no start time: use its directory's
            recorded.sort(key=lambda run: run[1].started_at or run[0].path.stat().st_mtime)
        runs += recorded
    if not runs:
        raise UserError(f"No run with a record is in {', '.join(map(str, paths))}.", "python -m launcher, then again")
    return runs


def runs_in(path: Path) -> list[RunDir]:
    """The run in a folder, the runs of its sweep, or the runs in its folders."""
    if RunDir(path).has_record():
        return [RunDir(path)]
    if (path / JSON).is_file():
        rows = read_typed(path / JSON, list[_Row]) or []
        return [RunDir(Path(row.run_dir)) for row in rows if row.run_dir is not None]
    return run_dirs_in(path)


def write_page(
    runs: Sequence[tuple[RunDir, Record]], page_path: Path | None, folder: Path | None, formats: Sequence[str]
) -> None:
    """Write the page, the figures as files, or both; UserError if matplotlib is not installed."""
    try:
        sections = importlib.import_module("launcher.report.page.sections")
    except ModuleNotFoundError as error:
        raise UserError(f"Figures need {error.name}, which is not installed.", pip_install("report")) from None
    figures = importlib.import_module("launcher.report.page.figures")
    records = [record for _, record in runs]
    references = {folder: references_in(folder) for folder in {run_dir.path.parent for run_dir, _ in runs}}
    badges = [verdict_of(run_dir, references[run_dir.path.parent]) for run_dir, _ in runs]
    report = sections.Report(records, badges)
    parts = report.sections()
    if page_path is not None:
        summary = f"{len(records)} runs, {sum(record.status == 'ok' for record in records)} of them ok, "
        summary += f"{badges.count('VALID')} valid (python -m launcher.verify)."
        footer = f"launcher {__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
        write_text(page_path, page(f"Runs of {records[0].model}", summary, parts, footer))
        print(f"wrote {page_path}", file=sys.stderr)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in report.figures:
            for suffix in formats:
                figures.save(figure, folder / f"{name}.{suffix}")
        print(f"wrote {len(report.figures)} figures to {folder}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 with one line on stderr for a mistake that the user can fix."""
    try:
        arguments = parse(argv)
        formats = arguments.format.split(",")
        if unknown := [name for name in formats if name not in FORMATS]:
            raise UserError(f"--format={unknown[0]} is not known.", f"--format={','.join(FORMATS)}")
        runs = read_runs(arguments.paths)
        if arguments.html or arguments.figures:
            write_page(runs, arguments.html, arguments.figures, formats)
    except OSError as error:
        fact = f"Cannot write {error.filename}: {error.strerror}."
        print(UserError(fact, "another folder, as ~/page.html or ~/figures"), file=sys.stderr)
        return 2
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows = rows_of([record for _, record in runs])
    if arguments.csv:
        print(csv_text(rows), end="")
    elif arguments.json:
        print(json.dumps(rows, indent=1))
    elif arguments.markdown or not (arguments.html or arguments.figures):
        print(markdown_text(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
