"""A successful run, read from its directory for a comparison."""

from __future__ import annotations

import shlex
from pathlib import Path

from launcher.results.comparison import FinishedRun
from launcher.run_dir.run_dir import RECORD, RunDir
from shards.errors import UserError


def read_finished(path: Path) -> FinishedRun:
    """The run in a directory; UserError if there is none, it cannot be read, or it did not succeed."""
    if not path.is_dir():
        kind, folder = "not there", Path("runs")
        if path.exists():
            kind, folder = "a file, not the directory of a run", path.parent
        raise UserError(f"{path} is {kind}.", f"python -m launcher.status {shlex.quote(str(folder))}, which names runs")
    run_dir = RunDir(path)
    record, again = run_dir.read_record(), f"python -m launcher resume=true run_dir={shlex.quote(str(path))}"
    if record is None:
        raise UserError(f"{path} has no {RECORD}.", "python -m launcher.status runs, which names run directories")
    if record.status != "ok":
        raise UserError(f"{path} did not finish: its status is {record.status}.", again)
    prompts = {prompt.index: prompt.token_ids for prompt in run_dir.read_prompts()}
    completions = {completion.index: completion for completion in run_dir.read_completions()}
    if not prompts or prompts.keys() != completions.keys():
        raise UserError(f"{path} has {len(completions)} completions for {len(prompts)} prompts.", again)
    if record.metrics is None:
        raise UserError(f"{path} has no metrics in its record.", again)
    return FinishedRun(path, record, prompts, completions)
