"""Reading a job's state from squeue while it changes from call to call; a fake program replaces squeue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import status
from launcher.composition.compose import compose_run
from launcher.launch.slurm import arrays, jobs
from launcher.prepare.prepare import prepare
from launcher.run_dir.lifecycle import create_run_dir
from launcher.run_dir.run_dir import RunDir
from shards.errors import UserError


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run in job 7, with a fake squeue that prints one line of the file `said` per call, and then fails."""
    overrides = ["launch=slurm", "backend=dummy", "devices=1", "accelerator=cpu", f"output_dir={tmp_path}/runs"]
    run_dir = create_run_dir(prepare(compose_run(overrides), ("python", "-m", "launcher")))
    run_dir.write_job("7")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\ncd {tmp_path}\nhead -n 1 said | grep . || exit 1\nsed -i 1d said\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    monkeypatch.setattr(jobs, "SETTLE_S", 0.0)
    return run_dir


AGAIN = "7|PREEMPTED|None|0|\n7|PENDING|BeginTime|1|\n"
OVER = "7|PREEMPTED|None|0|\n7|PREEMPTED|None|0|\n"


@pytest.mark.parametrize(
    ("said", "shown"), [(AGAIN, "PENDING (BeginTime), attempt 2"), (OVER, "cancelled")], ids=["again", "over"]
)
def test_only_a_job_that_stays_over_gets_a_record(
    said: str, shown: str, queued: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "said").write_text(said)
    status.main([str(queued)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["points"] == {shown: 1}
    assert queued.has_record() == (said == OVER)


@pytest.mark.parametrize(
    ("said", "words"), [(AGAIN, "is in job 7, which is PENDING"), ("", "squeue does not answer")], ids=["again", "mute"]
)
def test_a_run_that_may_be_in_a_job_is_not_submitted(said: str, words: str, queued: RunDir, tmp_path: Path) -> None:
    (tmp_path / "said").write_text(said)
    with pytest.raises(UserError, match=words):
        arrays.submit_run(queued)
    assert not (queued.path / "submit.sbatch").exists()
