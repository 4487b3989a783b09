"""`python -m launcher.verify RUN_DIR...`: VALID or INVALID with the reasons, for each run; `runs/*` works, too.

Checks that the files are unchanged (by hashes, which are no signature), the figures follow from the repeats, there was
a warm-up, there were enough repeats with similar speeds and the same tokens, memory was as planned, nothing exceeds
100 % of a ceiling, and no other process used the devices. The tokens are compared with runs of the reference
(`backend=transformers`) that have the same prompts, next to the run or given by --reference. Exit code: 0 all are
valid, 1 some are not, 2 one cannot be read.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.report.layout import console, fitted, print_json
from launcher.run_dir.run_dir import RunDir
from launcher.run_dir.verify import references_in, verify
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from rich.console import Console

    from launcher.results.figures.validity import Validity

SEEN = {True: "ok", False: "[red]INVALID[/]", None: "not checked"}


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(prog="python -m launcher.verify", description="Whether the figures of runs can be relied on.")
    parser.add_argument("runs", type=Path, metavar="RUN_DIR", nargs="+")
    parser.add_argument("--reference", type=Path, metavar="RUN_DIR", help="a run whose tokens are the right ones")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_intermixed_args(argv)


def show(path: Path, validity: Validity, out: Console) -> None:
    """Print the checks of one run, and its badge."""
    rows = [[check.name, SEEN[check.is_met], escape(check.text)] for check in validity.checks]
    out.print(fitted(out, ("check", "", "seen"), rows, texts=("seen",), title=escape(path.name)))
    colour = "red"
    if validity.is_valid:
        colour = "green"
    out.print(f"[bold {colour}]{escape(validity.line)}[/]", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all runs are valid, 1 if some are not, 2 with one line on stderr for a run that cannot be read."""
    try:
        arguments = parse(argv)
        around: dict[Path, list[RunDir]] = {}
        checked: dict[Path, Validity] = {}
        for path in arguments.runs:
            if arguments.reference is not None:
                around[path.parent] = [RunDir(arguments.reference)]
            elif path.parent not in around:
                around[path.parent] = references_in(path.absolute().parent)
            checked[path] = verify(RunDir(path), around[path.parent])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if not arguments.json:
        for path, validity in checked.items():
            show(path, validity, console())
    rows = [{"run_dir": str(path), "valid": report.is_valid, **asdict(report)} for path, report in checked.items()]
    are_valid = all(validity.is_valid for validity in checked.values())
    print_json({"valid": are_valid, "runs": rows}, arguments.json)
    if are_valid:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(run_command(main))
