"""A server that is started in a job of a real SLURM: it is used within the job, and ends with it."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from running import ROOT, launcher
from slurm_cluster import SlurmCluster, wait_until

from launcher.run_dir.run_dir import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150)]

FAKE = ROOT / "tests" / "helpers" / "fake_server.py"


def asked(folder: Path, step_s: float) -> list[str]:
    """The overrides of a run that starts the fake server, with a folder's name on its command line to find it by."""
    return [
        "launch=slurm", "launch.poll_s=0.3", "backend=endpoint", "server=vllm", "accelerator=cpu", "devices=1",
        "prompts=synthetic", "prompts.count=40", "prompts.input_tokens=4", "prompts.output_tokens=8",
        f"server.command='{sys.executable} {FAKE} {{port}} {step_s} {folder}'", "server.cpu_arguments=",
        "load.concurrency=4", "measure.warmup=0", "measure.repeats=1",
    ]  # fmt: skip


def servers(folder: Path) -> list[int]:
    return [one.pid for one in psutil.process_iter(["cmdline"]) if str(folder) in (one.info["cmdline"] or [])]


@pytest.mark.slow
def test_a_server_lives_as_long_as_its_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    env = {name: slurm.env[name] for name in ("SLURM_CONF", "PATH")}
    done = launcher(*asked(tmp_path, 0.001), cwd=tmp_path, **env)
    assert done.code == 0, done.err
    record = RunDir(Path(done.last_json["run_dir"])).read_record()
    assert record is not None
    assert record.totals is not None
    assert (record.status, record.totals.new_tokens) == ("ok", 40 * 8)
    assert servers(tmp_path) == []

    submitted = launcher("launch.wait=false", *asked(tmp_path, 0.2), cwd=tmp_path, **env)
    assert submitted.code == 0, submitted.err
    run_dir = Path(submitted.last_json["run_dir"])
    saved = run_dir / "rank_0.completions.jsonl"
    wait_until(lambda: saved.exists() and saved.stat().st_size > 0, 60, "the first answers", lambda: None)
    assert len(servers(tmp_path)) == 1
    slurm.run("scancel", submitted.last_json["job"])
    wait_until(lambda: not slurm.squeue(), 60, "an empty queue", slurm.squeue)
    wait_until(lambda: not servers(tmp_path), 30, "the end of the server", lambda: servers(tmp_path))
