"""`measure.find_batch_size=true`: find the largest batch that fits, by trial, and compare it with the plan.

Each trial is a separate run in new processes: one batch of the longest prompts, with EOS ignored. The run itself then
uses the largest batch that fits.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.values import to_dict
from launcher.prepare.prepare import prepare
from launcher.results.record import BatchSearch, BatchTry
from launcher.run_dir.lifecycle import create_run_dir, new_folder, what_is_run
from launcher.run_dir.run_dir import run_dirs_in
from shards.errors import PlanError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from launcher.results.record import Record
    from launcher.run_dir.run import Run
    from launcher.run_dir.run_dir import RunDir

    Start = Callable[[RunDir], Record]

STEPS = 16  # the first step of the search is 1/16 of the starting batch
MOST = 2**20


def run_with_largest_batch(run: Run, start: Start) -> Record:
    """Find the largest batch, and run with it; returns the record of the run.

    If a trial fails for another reason than memory, or no batch fits, returns the record of that trial.
    """
    config = run.config
    if config.resume and (earlier := _earlier_search(config)) is not None:
        return start(earlier)
    tries = Tries(run, new_folder(config, "_tries"), start)
    most, planned = tries.prompts_each, None
    if run.plan is not None and run.plan.largest_batch:
        most, planned = MOST, run.plan.largest_batch
    try:
        batch = largest(tries.fits, min(planned or config.measure.batch_size, most), most)
    except TryFailedError as error:
        return error.record
    if not batch:
        return tries.records[1]
    limited_by, plan_over_found = "memory", None
    if batch == most:
        limited_by = "prompts"
    if planned is not None:
        plan_over_found = planned / batch
    search = BatchSearch(
        largest_batch=batch,
        limited_by=limited_by,
        planned=planned,
        plan_over_found=plan_over_found,
        tries=tuple(BatchTry(size, record.status, record.run_dir) for size, record in tries.records.items()),
        asked=what_is_run(to_dict(config)),
    )
    config = replace(config, measure=replace(config.measure, batch_size=batch, find_batch_size=False))
    try:
        run = prepare(config, run.command)
    except PlanError:
        run = replace(run, config=config)  # by the planner this batch does not fit, so keep the old plan
    return start(create_run_dir(run, search))


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest batch in 1..`most` that fits, 0 for none; `fits` must be monotonic.

    The search goes from `start` in steps that double until a lower and an upper bound are known, then bisects.
    """
    step, low, high = max(start // STEPS, 1), 0, most + 1  # `low` fits, `high` does not
    batch = start
    while high - low > 1:
        if fits(batch):
            low = batch
        else:
            high = batch
        if high > most:
            batch = min(low + step, most)
            step *= 2
        elif low == 0:
            batch = max(high - step, 1)
            step *= 2
        else:
            batch = (low + high) // 2
    return low


class TryFailedError(Exception):
    """A trial failed for another reason than memory, so it does not tell whether the batch fits."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.status)
        self.record = record


class Tries:
    """The trials of one search, in `folder`; `records` has their records by batch size."""

    def __init__(self, run: Run, folder: Path, start: Start) -> None:
        self.run, self.folder, self.start = run, folder, start
        self.ranks = run.config.num_shares
        self.prompts_each = ceil(len(run.prompts) / self.ranks)
        self.records: dict[int, Record] = {}

    def fits(self, batch: int) -> bool:
        """True if a run with a batch of this size succeeds."""
        config = self.run.config
        measure = replace(config.measure, batch_size=batch, warmup=0, repeats=1, find_batch_size=False)
        sampling = replace(config.sampling, ignore_eos=True)
        config = replace(config, measure=measure, sampling=sampling, output_dir=str(self.folder), resume=False)
        prompts = enlarged(self.run.prompts, batch, self.ranks)
        record = self.start(create_run_dir(replace(self.run, config=config, prompts=prompts)))
        self.records[batch] = record
        if record.status not in ("ok", "oom"):
            raise TryFailedError(record)
        return record.status == "ok"


def enlarged(prompts: tuple[Prompt, ...], batch: int, ranks: int) -> tuple[Prompt, ...]:
    """`batch` prompts for each of `ranks` ranks, longest first, repeated if there are too few."""
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
    chosen = []
    for index in range(batch * ranks):  # rank r answers prompts r, r + ranks, ...
        chosen.append(replace(ordered[index // ranks % len(ordered)], index=index))
    return tuple(chosen)


def _earlier_search(config: RunConfig) -> RunDir | None:
    """The newest run whose batch was found by a search for the same configuration; None if there is none."""
    point = what_is_run(to_dict(config))
    for run_dir in reversed(run_dirs_in(Path(config.output_dir))):
        with contextlib.suppress(UserError):
            search = run_dir.read_run().batch_search
            if search is not None and search.asked == point:
                return run_dir
    return None
