"""`python -m launcher.reproduce RUN_DIR`: repeat a run from its directory, and compare the two.

Configuration and prompts are read from the run directory; the model must be where it was. The new run gets its own
directory in --output-dir. The result is REPRODUCED if all answers have the same tokens and no speed or time differs by
more than the noise of the repeats. Exit code: 0 reproduced, 1 not reproduced, 2 a mistake that the user can fix.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.launch.run import run_again
from launcher.report.changes_table import show_changes
from launcher.report.layout import console, print_json
from launcher.report.run.tables import error_line
from launcher.results.changes import Changes
from launcher.results.comparison import compare
from launcher.results.figures.metrics import COUNTERS
from launcher.run_dir.finished import read_finished
from launcher.run_dir.run_dir import RunDir
from launcher.run_dir.verify import verify
from launcher.system.terminal import Parser, run_command
from launcher.system.typed import to_plain
from shards.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from launcher.results.comparison import FinishedRun


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(prog="python -m launcher.reproduce", description="Make a run again, and compare.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output-dir", default="runs", metavar="DIR", help="where the new run gets its directory")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_intermixed_args(argv)


def objections(before: FinishedRun, again: FinishedRun, changes: Changes) -> list[str]:
    """A line for each difference that makes the second run not a reproduction of the first."""
    comparison = compare(before, again)
    differences = []
    for change in changes.figures:
        if change.is_different and change.name not in COUNTERS:  # counters depend on timing
            differences.append(f"{change.name} is {change.verdict}")
    if (others := comparison.prompts - comparison.matching) > 0:
        differences.insert(0, f"{others} of {comparison.prompts} answers have other tokens")
    return differences


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if reproduced, 1 if not, 2 with one line on stderr for a mistake that the user can fix."""
    try:
        arguments = parse(argv)
        before = read_finished(arguments.run)
        command = ("python", "-m", "launcher.reproduce", str(arguments.run.absolute()))
        record = run_again(RunDir(arguments.run), arguments.output_dir, command)
        if record.status == "submitted":
            raise UserError(
                f"{record.run_dir} was submitted.", f"launcher.compare {arguments.run} it, once it has ended"
            )
        if record.status != "ok" or record.run_dir is None:
            print(error_line(record), file=sys.stderr)
            return 1
        again = read_finished(Path(record.run_dir))
        changes = Changes.of(before.record, again.record)
        others = objections(before, again, changes)
        validity = verify(RunDir(again.run_dir))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if not arguments.json:
        out = console()
        show_changes([changes], [before.run_dir.name, again.run_dir.name], out)
        out.print(f"the new run: {escape(validity.line)}", soft_wrap=True)
        if others:
            verdict = f"[bold yellow]NOT REPRODUCED[/]: {escape('; '.join(others))}"
        else:
            verdict = "[bold green]REPRODUCED[/]"
        out.print(verdict, soft_wrap=True)
    line = {"reproduced": not others, "objections": others, "run_dir": record.run_dir, "verified": validity.badge}
    print_json({**line, "figures": to_plain(changes.figures)}, arguments.json)
    if others:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
