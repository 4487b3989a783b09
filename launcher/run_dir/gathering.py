"""Gather the record and the completions of a run from the files of its ranks.

For each prompt the first saved completion counts, whatever attempt it is from.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.machine import how_to_know_rates
from launcher.prompts.prompts import decode
from launcher.results.completions import ReportedCompletion, SavedCompletion
from launcher.results.figures.cost import cost_of
from launcher.results.figures.metrics import figures, total
from launcher.results.figures.utilisation import against_ceiling, bandwidth_used
from launcher.results.record import Attempt, Record, RepeatSummary
from launcher.results.verdict import LastStep, verdict
from launcher.run_dir.lifecycle import unfinished
from launcher.run_dir.run_dir import RunDir
from launcher.run_dir.typed_files import AGAIN
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.backends.base import Prompt
    from launcher.results.measured import Repeat
    from launcher.results.rank_result import RankResult
    from launcher.results.verdict import Outcome
    from launcher.run_dir.run import RunDescription


def finish(run_dir: RunDir, outcome: Outcome | None = None) -> Record:
    """Gather the results of the ranks into the record and the completions of the run; both are replaced atomically."""
    run = run_dir.read_run()
    prompts, plan = run_dir.read_prompts(), run_dir.read_plan()
    ranks = run_dir.read_ranks(run.world_size)
    present = [rank for rank in ranks if rank is not None]
    silent = {
        number: LastStep(step.stage, step.time)
        for number, step in enumerate(run_dir.read_progress(len(ranks)))
        if step is not None and ranks[number] is None
    }
    status, error = verdict(ranks, silent, outcome, lambda rank: run_dir.rank(rank).log_end())

    attempts = [*run_dir.earlier_attempts(), (run_dir.read_attempt(), run_dir)]
    repeats = {number: folder.read_repeats(run.answering_ranks) for number, folder in attempts}
    measured = metrics = tokens_per_s = None
    if status == "ok":
        counted = [ranks for numbered in repeats.values() for ranks in numbered.values()]
        windows = plan.windows if plan else ()
        measured = figures(counted, len(prompts), run.num_devices, windows, run.run_config.slo)
    if measured is not None:
        metrics, tokens_per_s = measured.metrics, measured.new_tokens_per_s
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
            tokens_per_s,
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
    """The record, with the load time of the slowest rank if the run succeeded."""
    if record.status != "ok":
        return record
    slowest = max(ranks, key=lambda rank: rank.load_s or 0.0)
    return replace(record, load_s=slowest.load_s or 0.0, load_times=slowest.load_times)


def _attempt(number: int, folder: RunDir, world_size: int, repeats: Mapping[int, Sequence[Repeat]]) -> Attempt:
    """One attempt for the record, with the repeats that it finished."""
    record = folder.read_record()
    summaries = []
    for index, ranks in repeats.items():
        sums = total(ranks)
        summaries.append(
            RepeatSummary(index + 1, sums.completions, sums.new_tokens, sums.wall_s, sums.new_tokens_per_s)
        )
    status = None
    if record is not None:
        status = record.status
    hosts = {rank.host for rank in folder.read_ranks(world_size) if rank is not None}
    return Attempt(
        attempt=number,
        status=status,
        hosts=tuple(sorted(hosts)),
        notes=tuple(folder.read_notes()),
        repeats=tuple(summaries),
    )


def _write_completions(run_dir: RunDir, run: RunDescription, prompts: Sequence[Prompt]) -> None:
    """Write all completions that this and earlier attempts have saved, with their texts."""
    saved: dict[int, SavedCompletion] = {}
    for item in (*run_dir.read_saved().completions, *run_dir.read_rank_completions(run.answering_ranks)):
        saved.setdefault(item.index, item)
    if not saved:
        return
    by_index = {prompt.index: prompt for prompt in prompts}
    if strange := saved.keys() - by_index.keys():
        raise UserError(f"{run_dir} has a completion of prompt {min(strange)}, which is not one of its prompts.", AGAIN)
    items = [saved[index] for index in sorted(saved)]
    folder = None
    if run.model_folder:
        folder = Path(run.model_folder)
    texts = decode([item.token_ids for item in items], folder)
    lines = []
    for item, text in zip(items, texts, strict=True):
        prompt, new_tokens = by_index[item.index], item.num_tokens
        if new_tokens is None:
            new_tokens = len(item.token_ids)
        line = ReportedCompletion(
            index=prompt.index,
            prompt=prompt.text,
            text=text if item.text is None else item.text,
            token_ids=item.token_ids,
            prompt_tokens=len(prompt.token_ids),
            new_tokens=new_tokens,
            finish_reason=item.finish_reason,
            top2_gaps=item.top2_gaps,
            failure=item.failure,
        )
        lines.append(line)
    run_dir.write_completions(lines)
