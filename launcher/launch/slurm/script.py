"""The SLURM batch script of a run, as text. No #SBATCH line contains a path; everything else is quoted for bash."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.run_dir.run_dir import RUN, SLURM_JOB, SLURM_LOG, SLURM_SCRIPT
from shards.errors import UserError
from shards.machine.interpreter import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.config.parts.launching import ClusterConfig
    from launcher.run_dir.run import RunDescription

AGAIN = 75  # exit code of interrupted ranks, and of a job that is requeued
OTHERS = (  # variables that another launcher or the submitting shell may have set
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR MASTER_PORT CROSS_RANK "
    "CROSS_SIZE TORCHELASTIC_RUN_ID LAUNCHER_PARENT LAUNCHER_RUN"
)
CORES_OF_A_CARD = 4  # 1 launches its kernels, the others are for checkpoint readers, NCCL and vLLM's processes
FREE_PORT = (  # below Linux's ephemeral ports (32768), which an outgoing connection could take before rank 0 does
    "import random, socket; "
    "print(next(p for p in random.sample(range(20000, 32768), 99) if socket.socket().connect_ex(('', p))))"
)


@dataclass(frozen=True, slots=True)
class Job:
    """The settings that determine a batch script; runs with equal settings share an array."""

    cluster: ClusterConfig
    num_nodes: int
    tasks_per_node: int
    devices: int  # on each node
    on_cuda: bool
    python: str  # interpreter of the ranks
    own_python: str  # interpreter that begins and ends the attempt
    root: str | None  # the folder of this project if it is a checkout

    @property
    def cpus_per_task(self) -> int:
        """Cores of a task: as configured, or as many as its GPUs need."""
        if self.cluster.cpus_per_task is not None:
            return self.cluster.cpus_per_task
        if self.on_cuda:
            return CORES_OF_A_CARD * self.devices // self.tasks_per_node
        return 1


def job_of(run: RunDescription) -> Job:
    """The job for a run: one task per rank, spread evenly over the nodes."""
    config = run.run_config
    cluster = config.cluster
    python, root = cluster.python or sys.executable, None
    if cluster.container and not cluster.python:
        python = "python3"
    if (ROOT / "pyproject.toml").is_file():
        root = str(ROOT)
    return Job(
        cluster=cluster,
        num_nodes=config.num_nodes,
        tasks_per_node=run.world_size // config.num_nodes,
        devices=config.devices,
        on_cuda=run.on_cuda,
        python=config.backend.python or python,
        own_python=python,
        root=root,
    )


def name_of(run: RunDescription) -> str:
    """A unique name for the job, of characters that SLURM and every shell accept."""
    text = f"{run.config['backend']['name']}_{run.config['model']['name']}_x{run.num_devices}"
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text) + f"-{run.mark[:6]}"


def sbatch_text(job: Job, name: str, points: Sequence[str] = ()) -> str:
    """The batch script of a run, or of an array of the run directories in `points`.

    Submit it from the run directory, an array from a folder next to the run directories. The exit code of the job is 0
    if every rank is ok, 2 if the run was refused, 75 if the job is requeued, 1 otherwise.
    """
    cluster = job.cluster
    words: dict[str, object] = {
        "job-name": name,
        "nodes": job.num_nodes,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": job.cpus_per_task,
    }
    cards = f"{cluster.gpu_type or ''}:{job.devices}".removeprefix(":")
    if job.on_cuda and cluster.gpus_flag == "gres":
        words["gres"] = f"gpu:{cards}"
    elif job.on_cuda and cluster.gpus_flag == "gpus-per-node":
        words["gpus-per-node"] = cards
    words |= {
        **{key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "reservation")},
        "mem": cluster.mem,
        "time": cluster.time,
    }
    if points:
        words["array"] = f"0-{len(points) - 1}%{cluster.array_limit}"
    if cluster.signal_s:
        words["signal"] = f"USR1@{cluster.signal_s}"
    words |= {"output": "/dev/null", "open-mode": "append"}
    options = [f"--{key}={value}" for key, value in words.items() if value is not None]
    if cluster.exclusive:
        options.append("--exclusive")
    if cluster.requeue:
        options.append("--requeue")
    else:
        options.append("--no-requeue")
    directives = [f"#SBATCH {option}" for option in (*options, *cluster.extra)]
    return "\n".join(["#!/bin/bash", *directives, "", *_command_lines(job, points), ""])


def _command_lines(job: Job, points: Sequence[str]) -> Iterator[str]:
    """The commands of the script: find the run directory and redirect output to its log, set the environment, run the
    ranks, and requeue the job or write the record."""
    cluster = job.cluster
    yield "# Submit it from the directory that it is in: sbatch " + SLURM_SCRIPT
    if points:
        yield "points=(" + " ".join(map(shlex.quote, points)) + ")"
        yield "run_dir=${PWD%/*}/${points[$SLURM_ARRAY_TASK_ID]}"
    else:
        yield "run_dir=$PWD"
    yield f'[ -f "$run_dir/{RUN}" ] || exit 2'
    yield f'exec >>"$run_dir/{SLURM_LOG}" 2>&1'
    yield "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    yield f'echo "$job" >"$run_dir/{SLURM_JOB}"'
    yield "terminated=; trap 'terminated=1' TERM"
    yield ""
    if cluster.modules:
        yield f"module load {shlex.join(cluster.modules)}"
    yield from cluster.setup
    yield f"unset {OTHERS}"
    exports = {"OMP_NUM_THREADS": str(job.cpus_per_task), "TOKENIZERS_PARALLELISM": "false"}
    if not job.on_cuda:
        exports["CUDA_VISIBLE_DEVICES"] = ""
    for key, value in (exports | cluster.environment).items():
        yield f"export {key}={shlex.quote(value)}"
    if job.root is not None:
        yield f"export PYTHONPATH={shlex.quote(job.root)}${{PYTHONPATH:+:$PYTHONPATH}}"
    yield "export LAUNCHER_WATCH=1  # the ranks end a run that hangs"
    yield "export LAUNCHER_ON_TERM=interrupt  # SLURM announces a pre-emption by SIGTERM"
    yield ""
    python = shlex.join([*cluster.container, job.own_python])
    ranks = shlex.join([*cluster.container, job.python, "-m", "launcher.rank.worker"])
    if not cluster.container:  # inside a container the parent's process id may not be visible
        ranks = f"sh -c 'export LAUNCHER_PARENT=$PPID; exec \"$@\"' sh {ranks}"
    options = ("--kill-on-bad-exit=1", f"--cpus-per-task={job.cpus_per_task}", *cluster.srun)
    yield f'LAUNCHER_ATTEMPT=$({python} -m launcher.run_dir.attempts "$run_dir") || exit 1'
    yield f'MASTER_PORT=$({python} -c "{FREE_PORT}") || exit 1'
    yield "export LAUNCHER_ATTEMPT MASTER_PORT"
    yield f'srun {shlex.join(options)} {ranks} "$run_dir"'
    yield "code=$?"
    yield f'{python} -m launcher.launch.slurm.end "$run_dir" "$code" "$terminated"'
    yield "final=$?"
    yield f'if [ "$final" = {AGAIN} ]; then'
    yield f'    [ -z "$terminated" ] && scontrol requeue "$job" && exit {AGAIN}'
    yield f'    {python} -m launcher.launch.slurm.end "$run_dir" "$code" final'
    yield "    final=$?"
    yield "fi"
    yield 'exit "$final"'


def not_found(program: str) -> UserError:
    """The error for a missing SLURM program."""
    return UserError(f"{program} is not found: this machine cannot submit to a SLURM.", "launch=local, or a login node")
