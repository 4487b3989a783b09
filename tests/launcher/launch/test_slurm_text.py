"""The text of the batch script: how each field of a cluster appears in it, and that no name is run as a command."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import Any

import pytest
from described import described
from running import ROOT

from launcher.config.cluster import check_cluster, seconds
from launcher.config.parts.launching import ClusterConfig
from launcher.config.schema import ConfigError
from launcher.launch.slurm.end import is_stopped
from launcher.launch.slurm.jobs import State, environment
from launcher.launch.slurm.script import Job, job_of, name_of, sbatch_text
from launcher.run_dir.run import RunDescription

JOB = Job(
    cluster=ClusterConfig(),
    num_nodes=2,
    tasks_per_node=4,
    devices=4,
    on_cuda=True,
    python="/opt/v/bin/python",
    own_python="/opt/v/bin/python",
    root="/home/me/launcher",
)

PLAIN = """\
#!/bin/bash
#SBATCH --job-name=fsdp_falcon_40b_x8-1f2e3d
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=4
#SBATCH --signal=USR1@90
#SBATCH --output=/dev/null
#SBATCH --open-mode=append
#SBATCH --requeue

# Submit it from the directory that it is in: sbatch submit.sbatch
run_dir=$PWD
[ -f "$run_dir/run.json" ] || exit 2
exec >>"$run_dir/slurm.log" 2>&1
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
echo "$job" >"$run_dir/slurm_job"
terminated=; trap 'terminated=1' TERM

unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR MASTER_PORT CROSS_RANK \
CROSS_SIZE TORCHELASTIC_RUN_ID LAUNCHER_PARENT LAUNCHER_RUN
export OMP_NUM_THREADS=4
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/home/me/launcher${PYTHONPATH:+:$PYTHONPATH}
export LAUNCHER_WATCH=1  # the ranks end a run that hangs
export LAUNCHER_ON_TERM=interrupt  # SLURM announces a pre-emption by SIGTERM

LAUNCHER_ATTEMPT=$(/opt/v/bin/python -m launcher.run_dir.attempts "$run_dir") || exit 1
MASTER_PORT=$(/opt/v/bin/python -c "import random, socket; \
print(next(p for p in random.sample(range(20000, 32768), 99) if socket.socket().connect_ex(('', p))))") || exit 1
export LAUNCHER_ATTEMPT MASTER_PORT
srun --kill-on-bad-exit=1 --cpus-per-task=4 sh -c 'export LAUNCHER_PARENT=$PPID; exec "$@"' sh /opt/v/bin/python \
-m launcher.rank.worker "$run_dir"
code=$?
/opt/v/bin/python -m launcher.launch.slurm.end "$run_dir" "$code" "$terminated"
final=$?
if [ "$final" = 75 ]; then
    [ -z "$terminated" ] && scontrol requeue "$job" && exit 75
    /opt/v/bin/python -m launcher.launch.slurm.end "$run_dir" "$code" final
    final=$?
fi
exit "$final"
"""

FULL = ClusterConfig(
    name="mine", partition="gpu", account="me", qos="high", constraint="[a|b]*2", reservation="r1", gpus_flag="gres",
    gpu_type="a6000", cpus_per_task=8, mem="64G", time="1-02:00:00", exclusive=True, signal_s=0, requeue=False,
    array_limit=2, extra=["--mail-type=END"], srun=["--mpi=none"], modules=["cuda/12.8", "gcc; rm -rf x"],
    setup=["ulimit -n 65536"], container=["apptainer", "exec", "--nv", "my image.sif"],
    environment={"NCCL_DEBUG": "WARN", "TEXT": "it's $(touch owned)\n100%"}, python="/sh are/python",
)  # fmt: skip

WHOLE = """\
#!/bin/bash
#SBATCH --job-name=x
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:a6000:2
#SBATCH --partition=gpu
#SBATCH --account=me
#SBATCH --qos=high
#SBATCH --constraint=[a|b]*2
#SBATCH --reservation=r1
#SBATCH --mem=64G
#SBATCH --time=1-02:00:00
#SBATCH --array=0-2%2
#SBATCH --output=/dev/null
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --mail-type=END

# Submit it from the directory that it is in: sbatch submit.sbatch
points=(a 'b c' 'd'"'"'$(e)')
run_dir=${PWD%/*}/${points[$SLURM_ARRAY_TASK_ID]}
[ -f "$run_dir/run.json" ] || exit 2
exec >>"$run_dir/slurm.log" 2>&1
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
echo "$job" >"$run_dir/slurm_job"
terminated=; trap 'terminated=1' TERM

module load cuda/12.8 'gcc; rm -rf x'
ulimit -n 65536
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR MASTER_PORT CROSS_RANK \
CROSS_SIZE TORCHELASTIC_RUN_ID LAUNCHER_PARENT LAUNCHER_RUN
export OMP_NUM_THREADS=8
export TOKENIZERS_PARALLELISM=false
export NCCL_DEBUG=WARN
export TEXT='it'"'"'s $(touch owned)
100%'
export LAUNCHER_WATCH=1  # the ranks end a run that hangs
export LAUNCHER_ON_TERM=interrupt  # SLURM announces a pre-emption by SIGTERM

LAUNCHER_ATTEMPT=$(apptainer exec --nv 'my image.sif' '/sh are/python' -m \
launcher.run_dir.attempts "$run_dir") || exit 1
MASTER_PORT=$(apptainer exec --nv 'my image.sif' '/sh are/python' -c "import random, socket; \
print(next(p for p in random.sample(range(20000, 32768), 99) if socket.socket().connect_ex(('', p))))") || exit 1
export LAUNCHER_ATTEMPT MASTER_PORT
srun --kill-on-bad-exit=1 --cpus-per-task=8 --mpi=none apptainer exec --nv 'my image.sif' '/sh are/python' \
-m launcher.rank.worker "$run_dir"
code=$?
apptainer exec --nv 'my image.sif' '/sh are/python' -m launcher.launch.slurm.end "$run_dir" "$code" "$terminated"
final=$?
if [ "$final" = 75 ]; then
    [ -z "$terminated" ] && scontrol requeue "$job" && exit 75
    apptainer exec --nv 'my image.sif' '/sh are/python' -m launcher.launch.slurm.end "$run_dir" "$code" final
    final=$?
fi
exit "$final"
"""


def unfolded(text: str) -> str:
    """An expected text without the line breaks that keep the lines of this file short."""
    return text.replace("\\\n", "")


def test_plain_script() -> None:
    assert sbatch_text(JOB, "fsdp_falcon_40b_x8-1f2e3d") == unfolded(PLAIN)


@pytest.mark.parametrize(
    ("changes", "cores"),
    [
        ({}, 4),
        ({"tasks_per_node": 1}, 16),  # vllm and transformers: one task for all GPUs of a node
        ({"on_cuda": False}, 1),
        ({"cluster": ClusterConfig(cpus_per_task=2)}, 2),
    ],
)
def test_cores_of_a_task(changes: dict[str, Any], cores: int) -> None:
    lines = sbatch_text(replace(JOB, **changes), "x").splitlines()
    assert f"#SBATCH --cpus-per-task={cores}" in lines
    assert f"export OMP_NUM_THREADS={cores}" in lines
    assert any(line.startswith(f"srun --kill-on-bad-exit=1 --cpus-per-task={cores} ") for line in lines)


def test_script_with_every_field() -> None:
    python = "/sh are/python"
    job = replace(
        JOB, cluster=FULL, num_nodes=1, tasks_per_node=1, devices=2, python=python, own_python=python, root=None
    )
    text = sbatch_text(job, "x", ["a", "b c", "d'$(e)"])
    assert text == unfolded(WHOLE)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=10)


def directives(job: Job) -> list[str]:
    lines = sbatch_text(job, "x").splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("cluster", "on_cuda", "expected"),
    [
        (ClusterConfig(), True, ["--gpus-per-node=4"]),
        (ClusterConfig(gpu_type="a100"), True, ["--gpus-per-node=a100:4"]),
        (ClusterConfig(gpus_flag="gres"), True, ["--gres=gpu:4"]),
        (ClusterConfig(gpus_flag="none"), True, []),
        (ClusterConfig(), False, []),
    ],
)
def test_how_gpus_are_asked_for(cluster: ClusterConfig, on_cuda: bool, expected: list[str]) -> None:
    found = directives(replace(JOB, cluster=cluster, on_cuda=on_cuda))
    assert [line for line in found if line.startswith(("--gpus", "--gres"))] == expected
    assert ("export CUDA_VISIBLE_DEVICES=''" in sbatch_text(replace(JOB, on_cuda=on_cuda), "x")) is not on_cuda


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            ClusterConfig(time="3600"),
            "cluster.time=3600 is not hours, minutes and seconds: YAML reads an unquoted 01:00:00 as 3600. "
            "HINT: cluster.time=01:00:00, in a file in quotes",
        ),
        (
            ClusterConfig(partition="a\n#SBATCH --uid=0"),
            "cluster.partition='a\\n#SBATCH --uid=0' has a blank, a quote, \\ or #. HINT: cluster.partition=a",
        ),
        (
            ClusterConfig(extra=["mail-type=END"]),
            "'mail-type=END' is not an option of sbatch. HINT: \"cluster.extra=['--mail-type=END']\"",
        ),
        (
            ClusterConfig(time="1:00"),
            "cluster.signal_s=90 is not before the end of cluster.time=1:00. HINT: cluster.signal_s=20",
        ),
        (ClusterConfig(gpus_flag="gpu"), "cluster.gpus_flag=gpu is not known. HINT: cluster.gpus_flag=gpus-per-node"),
        (
            ClusterConfig(gpus_flag="none", gpu_type="a6000"),
            "cluster.gpu_type=a6000 is not used with cluster.gpus_flag=none. HINT: cluster.gpus_flag=gpus-per-node",
        ),
        (
            ClusterConfig(requeue=False, max_requeues=3),
            "cluster.max_requeues=3 is not used with cluster.requeue=false. HINT: cluster.requeue=true",
        ),
        (
            ClusterConfig(environment={"A-B": "1"}),
            "cluster.environment.A-B: 'A-B' is not the name of a variable. HINT: cluster.environment.A_B=1",
        ),
    ],
)
def test_what_a_cluster_cannot_be_told(cluster: ClusterConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cluster(cluster)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("1:30", 90),
        ("01:00:00", 3600),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
        ("INFINITE", None),
    ],
)
def test_time_limits_in_seconds(time: str, expected: int | None) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["30:00", "01:00:00", "1-12", "1-12:30", "2-00:00:00", "UNLIMITED", None])
def test_times_that_slurm_takes(time: str | None) -> None:
    check_cluster(ClusterConfig(time=time))


def test_names_of_jobs_are_plain() -> None:
    model = {"name": "a b/c'$(d)", "path": "m"}
    run = described({"backend": {"name": "fsdp"}, "model": model}, num_devices=2, mark="0123456789")
    assert name_of(run) == "fsdp_a_b_c___d__x2-012345"


def run_of(**config: object) -> RunDescription:
    return described({"backend": {"name": "fsdp"}, **config}, world_size=4, num_devices=4)


def test_job_is_made_from_the_description_of_a_run() -> None:
    job = job_of(run_of(num_nodes=2, devices=2, cluster={"python": "/shared/python"}))
    expected = (2, 2, 2, "/shared/python", "/shared/python", str(ROOT))
    assert (job.num_nodes, job.tasks_per_node, job.devices, job.python, job.own_python, job.root) == expected
    other = job_of(run_of(backend={"name": "fsdp", "python": "/engine/python"}, cluster={"container": ["in", "it"]}))
    assert (other.python, other.own_python) == ("/engine/python", "python3")


@pytest.mark.parametrize(
    ("ranks", "code", "expected"),
    [
        (["interrupted", "interrupted"], 75, True),
        (["ok", "interrupted"], 75, True),
        (["interrupted", None], 143, True),
        ([None, None], 143, True),
        ([None, None], 1, False),
        (["ok", "ok"], 0, False),
        (["failed", "interrupted"], 1, False),
        (["silent", "interrupted"], 137, False),
        (["refused", None], 2, False),
    ],
)
def test_only_what_was_stopped_from_outside_goes_on(ranks: list[str | None], code: int, expected: bool) -> None:
    assert is_stopped(ranks, code) is expected


def test_states_read_like_slurm_says_them() -> None:
    assert str(State("PENDING", "Resources")) == "PENDING (Resources)"
    assert str(State("RUNNING", "None", 2)) == "RUNNING, attempt 3"
    assert (State("COMPLETED").is_end, State("PENDING").is_end, State("COMPLETING").is_end) == (True, False, False)


def test_sbatch_is_told_nothing_of_a_job_around_it() -> None:
    here = {"PATH": "/bin", "SLURM_CONF": "/c", "SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "1", "SBATCH_ACCOUNT": "me"}
    assert environment(here) == {"PATH": "/bin", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "me"}
