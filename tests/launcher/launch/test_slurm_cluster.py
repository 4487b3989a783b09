"""The SLURM helper of the other tests: it starts, runs jobs, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT
from slurm_cluster import SlurmCluster, end_stale, members, missing, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(60)]


def test_two_tasks_on_each_of_two_nodes(slurm: SlurmCluster) -> None:
    assert slurm.node_states() == {"n1": "idle", "n2": "idle"}
    line = 'echo "$SLURM_PROCID $(hostname) $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"'
    done = slurm.run("srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "sh", "-c", line)
    assert sorted(done.stdout.splitlines()) == ["0 n1 0 0,1", "1 n1 1 0,1", "2 n2 0 0,1", "3 n2 1 0,1"]


@pytest.mark.parametrize(
    ("command", "state", "code"), [("srun hostname", "COMPLETED", "0:0"), ("srun sh -c 'exit 3'", "FAILED", "3:0")]
)
def test_batch_job_ends_with_the_state_of_its_script(
    slurm: SlurmCluster, tmp_path: Path, command: str, state: str, code: str
) -> None:
    job_id = slurm.sbatch(f"#!/bin/sh\n{command}\n", "-N2", cwd=tmp_path)
    job = slurm.wait_state(job_id, "COMPLETED", "FAILED")
    assert (job["JobState"], job["ExitCode"], slurm.squeue()) == (state, code, [])
    printed = (tmp_path / f"slurm-{job_id}.out").read_text().splitlines()
    assert sorted(printed) == ["n1", "n2"] if state == "COMPLETED" else printed


ABANDONED = """
import os, sys, time
from slurm_cluster import SlurmCluster
cluster = SlurmCluster("netns", nodes=1)
cluster.start()
task = "trap : TERM; echo $$ > pid; while :; do sleep 1; done"
cluster.sbatch(f"#!/bin/sh\\nenv -i setsid sh -c '{task}'\\n", cwd=sys.argv[1])
print(cluster.folder, flush=True)
time.sleep(60)
"""


def test_cluster_of_a_killed_owner_is_ended_with_its_jobs(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/helpers"}
    with subprocess.Popen(
        [sys.executable, "-c", ABANDONED, tmp_path], env=env, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"), 20, "task")
        end_stale()
        assert folder.exists(), "the owner lives"
        owner.send_signal(signal.SIGKILL)
    task = int((tmp_path / "pid").read_text())
    assert task in members(folder)
    end_stale()
    assert (list(members(folder)), folder.exists(), Path(f"/proc/{task}/exe").exists()) == ([], False, False)
    assert not list(Path("/sys/class/net").glob(f"sl{folder.name.rpartition('-')[2]}*"))
