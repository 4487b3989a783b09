"""`python -m launcher.compare BASE NEW ...`: compare runs with the first one; `runs/*` works, too.

Prints the share of equal completions, the first divergence of the others and the logit gap of the two best tokens
there, and the degenerate texts. For each figure (speed, times, load, memory of each device) it prints the change and
whether that exceeds the noise of the repeats, then all other differences between the runs. With `--fail-if
'new_tokens_per_s<0.95'` the exit code is 1 if the new figure is less than 0.95 times that of the base.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import math
import sys
from argparse import ArgumentTypeError
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.report.changes_table import show_changes
from launcher.report.comparison_table import COMPARED_MEMORY, show
from launcher.report.layout import console, print_json
from launcher.report.run.tables import badge_line
from launcher.results.changes import EXAMPLE, Changes, Rule
from launcher.results.comparison import Comparison, FinishedRun, compare, labels
from launcher.run_dir.finished import read_finished
from launcher.run_dir.run_dir import RunDir
from launcher.run_dir.verify import verdict_of
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from shards.untrusted_files import JsonObject


def missed_thresholds(comparison: Comparison, min_match: float | None, min_speed_ratio: float | None) -> list[str]:
    """A sentence for each threshold that this pair does not reach."""
    pair = f"{Path(comparison.other).name} against {Path(comparison.base).name}"
    missed = []
    if min_match is not None and comparison.match < min_match:
        missed.append(
            f"{pair}: {comparison.matching} of {comparison.prompts} completions are the same, not {min_match:g}."
        )
    if min_speed_ratio is not None and comparison.speed.median < min_speed_ratio:
        missed.append(f"{pair}: {comparison.speed.median:.3f} of its tokens/s, not {min_speed_ratio:g}.")
    return missed


def to_dict(
    runs: Sequence[FinishedRun], comparisons: Sequence[Comparison], parts: Sequence[Changes], misses: Sequence[str]
) -> JsonObject:
    """All results of the comparison, as plain JSON values."""
    fields = ("rank", "device", *COMPARED_MEMORY)
    memory = {}
    for run in runs:
        devices = run.record.devices
        memory[str(run.run_dir)] = [{name: getattr(device, name) for name in fields} for device in devices]
    return {
        "base": str(runs[0].run_dir),
        "comparisons": [
            asdict(comparison) | {"match": comparison.match} | asdict(part)
            for comparison, part in zip(comparisons, parts, strict=True)
        ],
        "devices": memory,
        "verified": {str(run.run_dir): verdict_of(RunDir(run.run_dir)) for run in runs},
        "missed": list(misses),
    }


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(prog="python -m launcher.compare", description="Compare runs with the first one.")
    parser.add_argument("base", type=Path, metavar="RUN", help="the run directory that the others are compared with")
    parser.add_argument("others", type=Path, metavar="RUN", nargs="+")
    parser.add_argument("--min-match", type=share, metavar="SHARE", help="least share of equal completions: 1 is all")
    parser.add_argument("--min-speed-ratio", type=ratio, metavar="RATIO", help="least ratio of the median tokens/s")
    parser.add_argument(
        "--fail-if",
        metavar="RULE",
        action="append",
        default=[],
        help=f"a ratio that makes the command fail: '{EXAMPLE}'",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_intermixed_args(argv)


def readable(base: Path, others: Sequence[Path], is_strict: bool) -> list[FinishedRun]:
    """The runs that can be compared, the base first; a line on stderr for each other run.

    UserError if fewer than two are left. With `is_strict`, or for only two runs, UserError for the first run that
    cannot be compared.
    """
    runs: list[FinishedRun] = []
    for path in (base, *others):
        try:
            run = read_finished(path)
            if runs:
                compare(runs[0], run)
            runs.append(run)
        except UserError as error:
            if is_strict or len(others) == 1:
                raise
            print(f"note: left out: {error.fact}", file=sys.stderr)
    if len(runs) < 2:
        raise UserError(f"{len(runs)} of {1 + len(others)} can be compared.", "name two runs of one prompt set")
    return runs


def share(text: str) -> float:
    """An argument from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise ArgumentTypeError(f"{text} is not a share from 0 to 1")
    return value


def ratio(text: str) -> float:
    """An argument of 0 or more."""
    if not 0 <= (value := float(text)) < math.inf:
        raise ArgumentTypeError(f"{text} is not a ratio of 0 or more")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a threshold is missed, or 2 with one line on stderr if the runs cannot be compared."""
    try:
        arguments = parse(argv)
        rules = [Rule.parse(text) for text in arguments.fail_if]
        is_strict = bool(rules) or arguments.min_match is not None or arguments.min_speed_ratio is not None
        runs = readable(arguments.base, arguments.others, is_strict)
        if arguments.json:
            comparisons = [compare(runs[0], other) for other in runs[1:]]
        else:
            comparisons = show(runs, console())
        parts = [Changes.of(runs[0].record, other.record) for other in runs[1:]]
        if not arguments.json:
            show_changes(parts, labels(runs), console())
            for run, name in zip(runs, labels(runs), strict=True):
                console().print(f"{escape(name)}: {badge_line(RunDir(run.run_dir))}", soft_wrap=True)
        misses: list[str] = []
        for comparison, part in zip(comparisons, parts, strict=True):
            misses += missed_thresholds(comparison, arguments.min_match, arguments.min_speed_ratio)
            pair = f"{Path(comparison.other).name} against {Path(comparison.base).name}"
            misses += [line for rule in rules for line in rule.broken_by(part.figures, pair)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for line in misses:
        print(f"missed: {line}", file=sys.stderr)
    print_json(to_dict(runs, comparisons, parts, misses), arguments.json)
    if misses:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
