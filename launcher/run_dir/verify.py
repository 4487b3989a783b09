"""Verify a run from its directory: its files, its figures, its record, and its tokens against reference runs."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from launcher.config.engines import engines
from launcher.results.comparison import compare
from launcher.results.figures.metrics import figures
from launcher.results.figures.validity import Check, Validity, check_reference, of_the_record
from launcher.run_dir.finished import read_finished
from launcher.run_dir.run_dir import RECORD, RunDir, run_dirs_in
from launcher.run_dir.seal import broken_seal
from launcher.run_dir.typed_files import MALFORMED, read_value, unreadable
from shards.errors import UserError
from shards.plan.memory import plan_tolerance

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from launcher.results.comparison import Comparison
    from launcher.results.record import Record
    from launcher.run_dir.run import RunDescription

WHAT_IS_ASKED = ("model", "precision", "sampling")
EXACT = "fp32"
"""The precision for comparisons with a reference: in narrower ones, tokens may differ if two logits are close."""


def verify(run_dir: RunDir, references: Iterable[RunDir] = ()) -> Validity:
    """All checks of a finished run; UserError if its files cannot be read.

    Only `references` with the same model, prompts and sampling count.
    """
    record = run_dir.read_record()
    if record is None:
        raise UserError(f"{run_dir} has no {RECORD}.", "python -m launcher.status runs, which names run directories")
    try:
        checks = [check_files(run_dir)]
        if not run_dir.has_run():
            return Validity((*checks, *of_the_record(record, plan_tolerance(None))))
        run = run_dir.read_run()
        if record.status == "ok":
            checks.append(check_figures(run_dir, run, record))
        checks += of_the_record(record, plan_tolerance(run.model_config.get("model_type")))
        if record.status == "ok":
            checks.append(_against_references(run_dir, record, references))
        return Validity(tuple(checks))
    except MALFORMED as error:
        raise unreadable(run_dir.path / RECORD, error) from None


def verdict_of(run_dir: RunDir, references: Iterable[RunDir] = ()) -> str:
    """The badge of a run, `unreadable` if its files cannot be read, empty for an unsuccessful run."""
    try:
        record = run_dir.read_record()
        if record is not None and record.status == "ok":
            return verify(run_dir, references).badge
        return ""
    except UserError:
        return "unreadable"


def references_in(folder: Path) -> list[RunDir]:
    """The successful runs of a reference engine in a folder."""
    runs = []
    for run_dir in run_dirs_in(folder):
        with contextlib.suppress(UserError):  # skip unreadable runs
            if run_dir.has_run() and is_reference(run_dir.read_run().config["backend"]["name"]) and run_dir.is_done():
                runs.append(run_dir)
    return runs


def is_reference(engine: str) -> bool:
    """True if the tokens of other engines are compared with those of this one."""
    kind = engines().get(engine)
    return kind is not None and kind.is_reference


def check_files(run_dir: RunDir) -> Check:
    """Check that the record and its files are unchanged."""
    problems = read_value(run_dir.path / RECORD, lambda values: broken_seal(values, run_dir.path))
    if problems:
        return Check("files", False, "; ".join(problems))
    return Check("files", True, "as they were written, by their hashes (which are no signature)")


def check_figures(run_dir: RunDir, run: RunDescription, record: Record) -> Check:
    """Check that the headline figures of the record follow from the repeats saved by the ranks."""
    folders = [*(folder for _, folder in run_dir.earlier_attempts()), run_dir]
    repeats = [ranks for folder in folders for ranks in folder.read_repeats(run.answering_ranks).values()]
    again = figures(repeats, len(run_dir.read_prompts()), run.num_devices)
    for name in ("new_tokens_per_s", "ttft_s", "itl_s"):
        before, now = getattr(record, name), getattr(again, name, None)
        if before != now and not (before and now and math.isclose(before, now)):
            return Check("figures", False, f"{name} is {before} in the record, and {now} by the repeats of the ranks")
    return Check("figures", True, "they follow from the repeats of the ranks")


def _against_references(run_dir: RunDir, record: Record, references: Iterable[RunDir]) -> Check:
    if record.precision != EXACT or record.config["sampling"]["temperature"]:
        return Check("reference", None, f"tokens are compared with the reference in {EXACT}, greedy")
    run = read_finished(run_dir.path)
    comparisons: list[Comparison] = []
    names: list[str] = []
    for reference in references:
        if reference.path.resolve() == run_dir.path.resolve():
            continue
        with contextlib.suppress(UserError):  # skip runs that are unreadable or have other prompts
            other = read_finished(reference.path)
            if any(other.record.config.get(key) != record.config.get(key) for key in WHAT_IS_ASKED):
                continue
            comparison = compare(other, run)
            if not comparison.notes:
                comparisons.append(comparison)
                names.append(reference.path.name)
    return check_reference(comparisons, names)
