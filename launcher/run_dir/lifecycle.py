"""A run directory from its beginning to its end: made with all that a rank reads, ended with the record of the run.

Nothing is lost: completions are those that were saved first, whichever attempt made them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from launcher.config.machine import how_to_know_rates
from launcher.config.schema import HOW_IT_IS_RUN
from launcher.config.values import to_dict
from launcher.prompts.prompts import decode
from launcher.results.completions import ReportedCompletion, SavedCompletion
from launcher.results.cost import cost_of
from launcher.results.metrics import against_ceiling, bandwidth_used, figures, total
from launcher.results.record import Attempt, Record, RepeatSummary, RunError
from launcher.results.verdict import LastStep, verdict
from launcher.run_dir.run import describe
from launcher.run_dir.run_dir import RunDir, run_dirs_in
from launcher.run_dir.typed_files import AGAIN
from launcher.system.files import make_folder
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from launcher.results.measured import Repeat
    from launcher.results.rank_result import RankResult
    from launcher.results.record import BatchSearch
    from launcher.results.verdict import Outcome
    from launcher.run_dir.run import Run, RunDescription
    from shards.untrusted_files import JsonObject


def directory_of(run: Run) -> RunDir:
    """The run directory: a new one, unless `resume=true` and the same run was begun before.

    It is the same run where model, prompts and all of the resolved configuration that says what is run are the same;
    of several the one that is done, else the latest.
    """
    before = _begun(run) if run.config.resume else []
    if not before:
        return create_run_dir(run)
    chosen, description = max(before, key=lambda item: (item[0].is_done(), item[1].started_at))
    if not chosen.is_done():  # the limits of time may be others than before
        chosen.write_run(describe(run, description.started_at, description.mark, description.batch_search))
    return chosen


def create_run_dir(run: Run, batch_search: BatchSearch | None = None) -> RunDir:
    """A new directory that no other run has, with everything a rank reads, and how its batch was searched if it was."""
    run_dir = RunDir(new_folder(run.config))
    description = describe(run, time.time(), uuid.uuid4().hex, batch_search)
    try:
        run_dir.write_config(yaml.safe_dump(description.config, sort_keys=False))
        run_dir.write_plan(run.plan)
        run_dir.write_prompts(run.prompts)
        run_dir.write_run(description)
    except OSError:
        shutil.rmtree(run_dir.path, ignore_errors=True)  # half of one is of no use, and a full disk has its room again
        raise
    return run_dir


def new_folder(config: RunConfig, suffix: str = "") -> Path:
    """A folder in `output_dir` that no other run has; UserError where none can be made."""
    model = re.sub(r"[^A-Za-z0-9._-]", "_", config.model.name)[:100]
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.backend.name}_{model}_x{config.num_devices}{suffix}"
    return make_folder(Path(config.output_dir), name)


def what_is_run(config: JsonObject) -> JsonObject:
    """The part of a resolved configuration by which two runs are the same point."""
    return {name: value for name, value in config.items() if name not in HOW_IT_IS_RUN}


def _begun(run: Run) -> list[tuple[RunDir, RunDescription]]:
    """The directories of the same run that have all that a rank reads; those that cannot be read are passed over."""
    same = []
    asked = what_is_run(to_dict(run.config))
    for run_dir in run_dirs_in(Path(run.config.output_dir)):
        with contextlib.suppress(UserError):
            before = run_dir.read_run()
            if (
                what_is_run(before.config) == asked
                and before.model_config == run.model_config
                and before.num_devices == run.num_devices
                and run_dir.read_prompts() == list(run.prompts)
            ):
                same.append((run_dir, before))
    return same


def finish(run_dir: RunDir, outcome: Outcome | None = None) -> Record:
    """Gather what the ranks left into the record and the completions of the run; both are replaced atomically."""
    run = run_dir.read_run()
    prompts, plan = run_dir.read_prompts(), run_dir.read_plan()
    ranks = run_dir.read_ranks(run.world_size)
    present = [rank for rank in ranks if rank is not None]
    status, error = verdict(ranks, _silent(run_dir, ranks), outcome, run_dir.log_end)

    attempts = [*run_dir.earlier_attempts(), (run_dir.read_attempt(), run_dir)]
    repeats = {number: folder.read_repeats(run.answering_ranks) for number, folder in attempts}
    if status == "ok":
        counted = [ranks for numbered in repeats.values() for ranks in numbered.values()]
    else:
        counted = []
    measured = figures(counted, len(prompts), run.num_devices, plan.windows if plan else (), run.run_config.slo)
    metrics = measured.metrics if measured else None
    hint = how_to_know_rates(run.run_config)
    record = replace(
        _with_load(unfinished(run_dir, status), present),
        error=error,
        ended_at=time.time(),
        compilation=next((rank.compilation for rank in present if rank.compilation), None),
        ceiling=against_ceiling(plan, metrics, hint),
        mbu=bandwidth_used(plan, metrics, hint),
        cost=cost_of(
            [rank.cost for rank in present if rank.cost is not None],
            sum(total(ranks).new_tokens for ranks in repeats[attempts[-1][0]].values()),
            metrics.new_tokens_per_s.median if metrics else None,
            run.num_devices,
            run.run_config.cost.device_hour,
        ),
        devices=tuple(device for rank in present for device in rank.devices),
        ranks=tuple(rank.record for rank in present),
        attempts=tuple(_attempt(number, folder, run.world_size, repeats[number]) for number, folder in attempts),
        notes=(*run.notes, *run_dir.read_notes()),
        plan=plan,
        quality=next((rank.quality for rank in present if rank.quality), None),
        environment=next((rank.environment for rank in present if rank.environment), None),
    )
    record = replace(record, attempts=(*record.attempts[:-1], replace(record.attempts[-1], status=status)))
    if measured is not None:
        record = replace(
            record,
            new_tokens_per_s=measured.new_tokens_per_s,
            ttft_s=measured.ttft_s,
            itl_s=measured.itl_s,
            totals=measured.totals,
            partial=measured.partial,
            metrics=metrics,
        )
    _write_completions(run_dir, run, prompts)
    return run_dir.write_record(record)


def _with_load(record: Record, ranks: Sequence[RankResult]) -> Record:
    """The record with the time that the slowest rank took to load, if all went well."""
    if record.status != "ok":
        return record
    slowest = max(ranks, key=lambda rank: rank.load_s or 0.0)
    return replace(record, load_s=slowest.load_s or 0.0, load_times=slowest.load_times)


def refused(config: RunConfig, error: UserError, moment: float, run_dir: RunDir | None = None) -> Record:
    """The record of a run that could not start."""
    why = RunError(None, "plan", type(error).__name__, error.fact, error.hint)
    path = str(run_dir) if run_dir else None
    return replace(blank(config, "refused"), error=why, run_dir=path, started_at=moment, ended_at=moment)


def refusal(config: RunConfig, error: UserError) -> Record:
    """The record of a point that is refused, in a directory of its own: with `resume=true` the one it had before."""
    try:
        before = _refused(config) if config.resume else []
        run_dir = before[0] if before else RunDir(new_folder(config))
        run_dir.write_config(yaml.safe_dump(to_dict(config), sort_keys=False))
        record = refused(config, error, time.time(), run_dir)
        return run_dir.write_record(record)
    except (UserError, OSError):
        return refused(config, error, time.time())  # nothing can be written there, which may be why it is refused


def _refused(config: RunConfig) -> list[RunDir]:
    """The directories in which the same point was refused before, with a record and nothing more."""
    same = []
    asked = what_is_run(to_dict(config))
    for run_dir in run_dirs_in(Path(config.output_dir)):
        with contextlib.suppress(UserError):
            record = None if run_dir.has_run() else run_dir.read_record()
            if record is not None and what_is_run(record.config) == asked:
                same.append(run_dir)
    return same


def never_begun(config: RunConfig, message: str, moment: float) -> Record:
    """The record of a point whose turn never came."""
    why = RunError(None, "start", "Ended", message, "resume=true")
    return replace(blank(config, "cancelled"), error=why, started_at=moment, ended_at=moment)


def unfinished(run_dir: RunDir, status: str) -> Record:
    """The record of a run that has not ended, as far as it is known."""
    run = run_dir.read_run()
    return replace(
        blank(run.run_config, status),
        world_size=run.world_size,
        num_devices=run.num_devices,
        config=run.config,
        run_dir=str(run_dir),
        started_at=run.started_at,
        batch_search=run.batch_search,
        notes=run.notes,
        command=run.command,
    )


def blank(config: RunConfig, status: str) -> Record:
    """The record of a run of which nothing but its configuration is known."""
    return Record(
        status=status,
        backend=config.backend.name,
        model=config.model.name,
        precision=config.precision.name,
        world_size=config.world_size,
        num_devices=config.num_devices,
        num_nodes=config.num_nodes,
        batch_size=None if config.backend.continuous_batching else config.measure.batch_size,
        config=to_dict(config),
    )


def _silent(run_dir: RunDir, ranks: Sequence[RankResult | None]) -> dict[int, LastStep]:
    """The last steps of the ranks that had begun and left no word."""
    steps = enumerate(run_dir.read_progress(len(ranks)))
    return {number: LastStep(step.stage, step.time) for number, step in steps if step and ranks[number] is None}


def _attempt(number: int, folder: RunDir, world_size: int, repeats: Mapping[int, Sequence[Repeat]]) -> Attempt:
    """One attempt, and the repeats that it finished."""
    record = folder.read_record()
    summaries = []
    for index, ranks in repeats.items():
        sums = total(ranks)
        summaries.append(
            RepeatSummary(index + 1, sums.completions, sums.new_tokens, sums.wall_s, sums.new_tokens_per_s)
        )
    hosts = {rank.host for rank in folder.read_ranks(world_size) if rank is not None}
    return Attempt(
        attempt=number,
        status=record.status if record else None,
        hosts=tuple(sorted(hosts)),
        notes=tuple(folder.read_notes()),
        repeats=tuple(summaries),
    )


def _write_completions(run_dir: RunDir, run: RunDescription, prompts: Sequence[Prompt]) -> None:
    """All completions that this attempt and those before it have saved so far, with their texts."""
    saved: dict[int, SavedCompletion] = {}
    for item in (*run_dir.read_saved().completions, *run_dir.read_rank_completions(run.answering_ranks)):
        saved.setdefault(item.index, item)
    if not saved:
        return
    asked = {prompt.index: prompt for prompt in prompts}
    if strange := saved.keys() - asked.keys():
        raise UserError(f"{run_dir} has a completion of prompt {min(strange)}, which is none of its prompts.", AGAIN)
    items = [saved[index] for index in sorted(saved)]
    texts = decode([item.token_ids for item in items], Path(run.model_folder) if run.model_folder else None)
    lines = [_reported(asked[item.index], item, text) for item, text in zip(items, texts, strict=True)]
    run_dir.write_completions(lines)


def _reported(prompt: Prompt, saved: SavedCompletion, text: str) -> ReportedCompletion:
    return ReportedCompletion(
        index=prompt.index,
        prompt=prompt.text,
        text=text if saved.text is None else saved.text,
        token_ids=saved.token_ids,
        prompt_tokens=len(prompt.token_ids),
        new_tokens=len(saved.token_ids) if saved.num_tokens is None else saved.num_tokens,
        finish_reason=saved.finish_reason,
        top2_gaps=saved.top2_gaps,
        failure=saved.failure,
    )
