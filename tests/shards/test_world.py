"""The environment variables of real launchers, and the ranks read from them; contradictions are errors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shards.errors import WorldError
from shards.machine.world import World, first_host, port_of, tasks_per_node

ELASTIC = {
    "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "40321", "RANK": "1", "ROLE_NAME": "default", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "011d5739", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2",
}  # fmt: skip
ACCELERATE = ELASTIC | {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
ACCELERATE_ON_CPU = {  # accelerate launch --cpu --num_processes 2 starts one process
    "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {
    "CROSS_RANK": "0", "CROSS_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_NAMESPACE": "1650524161", "PMIX_RANK": "1",
}  # fmt: skip
MPICH = {"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "8", "PMI_RANK": "1", "PMI_SIZE": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2", "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
}  # fmt: skip
BATCH = {  # a batch script of --nodes=2 --ntasks-per-node=2: a single task, and no step
    "SLURM_JOB_ID": "6", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
SRUN = BATCH | {
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
ONE_NODE = SRUN | {
    "SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
}  # fmt: skip
UNEVEN = SRUN | {
    "SLURM_LOCALID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x1),1",
}  # fmt: skip
ONE_TASK = ONE_NODE | {
    "SLURM_LOCALID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
}  # fmt: skip
HYDRA_IN_SLURM = SRUN | {  # mpirun starts its proxies with srun, and the ranks inherit srun's variables from them
    "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_RANK": "1", "PMI_SIZE": "4", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "MASTER_ADDR": "n1",
}  # fmt: skip
BY_HAND = {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu1",
}  # fmt: skip

PAIR = World(rank=1, local_rank=1, world_size=2, local_world_size=2)
SLURM_PORT = 22280  # derived from the checksum of "6.0" (job and step id)

WORLDS = {
    "nobody": ({"PATH": "/bin"}, World()),
    "torchrun": (ELASTIC, replace(PAIR, master_addr="localhost", master_port=40321, launcher="torchrun")),
    "torchrun with one process": (
        ELASTIC | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        World(master_addr="localhost", master_port=40321, launcher="torchrun"),
    ),
    "torchrun on two nodes, the ranks of node 1 first": (
        ELASTIC | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"},
        World(0, 0, 4, 2, 1, 2, "localhost", 40321, "torchrun"),
    ),
    "accelerate launch": (ACCELERATE, replace(PAIR, launcher="torchrun")),
    "accelerate launch --cpu": (ACCELERATE_ON_CPU, World()),
    "deepspeed": (DEEPSPEED, replace(PAIR, launcher="deepspeed")),
    "deepspeed on uneven nodes": (
        DEEPSPEED | {"CROSS_RANK": "1", "CROSS_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}
        | {"LOCAL_SIZE": "1", "WORLD_SIZE": "3"},
        World(2, 0, 3, 1, 1, 2, launcher="deepspeed"),
    ),
    "deepspeed --launcher impi": (
        MPICH | {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "2", "MASTER_PORT": "29501"},
        replace(PAIR, master_port=29501, launcher="mpirun"),
    ),
    "Open MPI": (OPEN_MPI, replace(PAIR, master_port=port_of("1650524161"), launcher="mpirun")),
    "MPICH": (MPICH, replace(PAIR, launcher="mpirun")),
    "MVAPICH": (MVAPICH, replace(PAIR, launcher="mpirun")),
    "mpirun -np 1": (
        MPICH | {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}, World()
    ),
    "Open MPI on two nodes": (
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
        | {"MASTER_ADDR": "n1", "MASTER_PORT": "1234"},
        World(3, 1, 4, 2, 1, 2, "n1", 1234, "mpirun"),
    ),
    "MPICH inside SLURM": (HYDRA_IN_SLURM, World(1, 1, 4, 2, 0, 2, "n1", launcher="mpirun")),
    "srun on two nodes": (SRUN, World(3, 1, 4, 2, 1, 2, "n1", SLURM_PORT, "srun")),
    "srun --mpi=pmi2": (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, World(3, 1, 4, 2, 1, 2, "n1", SLURM_PORT, "srun")),
    "srun on one node": (ONE_NODE, replace(PAIR, master_port=SLURM_PORT, launcher="srun")),
    "srun on uneven nodes": (UNEVEN, World(2, 0, 3, 1, 1, 2, "n1", SLURM_PORT, "srun")),
    "srun with an address and a world size that agree": (
        SRUN | {"MASTER_ADDR": "ib1", "MASTER_PORT": "7", "WORLD_SIZE": "4"}, World(3, 1, 4, 2, 1, 2, "ib1", 7, "srun")
    ),
    "srun --pty bash": (ONE_TASK, World()),
    "batch script": (BATCH, World()),
    "torchrun inside srun": (
        ELASTIC | ONE_NODE | {"SLURM_PROCID": "0"},
        replace(PAIR, master_addr="localhost", master_port=40321, launcher="torchrun"),
    ),
    "by hand": (BY_HAND, World(2, 0, 4, 2, 1, 2, "gpu1", launcher="environment")),
    "by hand, alone": ({"RANK": "0", "WORLD_SIZE": "1"}, World(launcher="environment")),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "world"), WORLDS.values(), ids=WORLDS)
def test_world_that_a_launcher_describes(environ: dict[str, str], world: World) -> None:
    assert World.from_env(environ) == world


WRONG = {
    "RANK alone": (
        {"RANK": "0"}, "RANK=0 and no WORLD_SIZE in the environment. HINT: unset RANK, or start with torchrun"
    ),
    "WORLD_SIZE alone": (
        {"WORLD_SIZE": "2"},
        "WORLD_SIZE=2 and no RANK in the environment. HINT: unset WORLD_SIZE, or start with torchrun",
    ),
    "no local rank": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        "RANK=0 WORLD_SIZE=2 and no LOCAL_RANK in the environment. HINT: unset RANK WORLD_SIZE, or start with torchrun",
    ),
    "no local size": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        "RANK=0 WORLD_SIZE=2 and no LOCAL_WORLD_SIZE in the environment. "
        "HINT: unset RANK WORLD_SIZE, or start with torchrun",
    ),
    "not a number": (
        ELASTIC | {"WORLD_SIZE": "two"},
        "WORLD_SIZE='two' is not a number. HINT: unset WORLD_SIZE, or let a launcher set it",
    ),
    "empty": (ELASTIC | {"RANK": ""}, "RANK='' is not a number. HINT: unset RANK, or let a launcher set it"),
    "rank too large": (
        ELASTIC | {"RANK": "2"},
        "RANK=2 is not a rank of WORLD_SIZE=2. HINT: RANK is 0 to 1; unset RANK and WORLD_SIZE to run alone",
    ),
    "rank below 0": (
        ELASTIC | {"RANK": "-1"},
        "RANK=-1 is not a rank of WORLD_SIZE=2. HINT: RANK is 0 to 1; unset RANK and WORLD_SIZE to run alone",
    ),
    "local rank too large": (
        ELASTIC | {"LOCAL_RANK": "2"},
        "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2 and WORLD_SIZE=2 contradict each other. "
        "HINT: start all ranks with one launcher, for example torchrun",
    ),
    "more on this node than in the world": (
        ELASTIC | {"LOCAL_WORLD_SIZE": "4"},
        "LOCAL_RANK=1, LOCAL_WORLD_SIZE=4 and WORLD_SIZE=2 contradict each other. "
        "HINT: start all ranks with one launcher, for example torchrun",
    ),
    "node that does not exist": (
        ELASTIC | {"GROUP_RANK": "1"}, "Node 1 is not one of 1 nodes. HINT: start all ranks with one launcher"
    ),
    "by hand on several nodes without an address": (
        {key: value for key, value in BY_HAND.items() if key != "MASTER_ADDR"},
        "There are 4 ranks, 2 on this node, and MASTER_ADDR is not set. HINT: export MASTER_ADDR=<host of rank 0>",
    ),
    "RANK of another world inside mpirun": (
        OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 is set, and mpirun says RANK=1. HINT: unset RANK"
    ),
    "WORLD_SIZE of the batch script, fewer tasks in the step": (
        SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, and srun says WORLD_SIZE=4. HINT: unset WORLD_SIZE"
    ),
    "mpirun on two nodes without an address": (
        MPICH | {"PMI_SIZE": "4"},
        "There are 4 ranks, 2 on this node, and MASTER_ADDR is not set. HINT: mpirun -x MASTER_ADDR=<host of rank 0> "
        "(MPICH, Intel MPI: -genv MASTER_ADDR <host>); port 29500",
    ),
    "mpirun on uneven nodes": (
        MPICH | {"PMI_SIZE": "3"},
        "mpirun started 3 ranks, and 2 of them on this node: not the same number on every node. "
        "HINT: mpirun -np 3 with as many slots on each node (Open MPI: --map-by ppr:N:node; MPICH: -ppn N)",
    ),
    "srun, a node too many": (
        SRUN | {"SLURM_NODEID": "2"},
        "SLURM_STEP_NUM_TASKS=4, SLURM_STEP_NUM_NODES=2, SLURM_STEP_TASKS_PER_NODE=2(x2) and SLURM_NODEID=2 "
        "contradict each other. HINT: start the ranks with srun, and do not set SLURM_* by hand",
    ),
    "srun, tasks that do not add up": (
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1"},
        "SLURM_STEP_NUM_TASKS=4, SLURM_STEP_NUM_NODES=2, SLURM_STEP_TASKS_PER_NODE=2,1 and SLURM_NODEID=1 "
        "contradict each other. HINT: start the ranks with srun, and do not set SLURM_* by hand",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "line"), WRONG.values(), ids=WRONG)
def test_contradiction_is_named_in_one_line(environ: dict[str, str], line: str) -> None:
    with pytest.raises(WorldError) as error:
        World.from_env(environ)
    assert str(error.value) == line


@pytest.mark.parametrize(
    "world", [World(3, 1, 4, 2, 1, 2, "n1", 1234, "environment"), World(2, 0, 3, 1, 1, 2, "n1", 1234, "environment")]
)
def test_variables_of_a_world_describe_the_same_world(world: World) -> None:
    assert World.from_env(world.environ()) == world


@pytest.mark.parametrize(
    ("text", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("2(x1),1", [2, 1]), ("8", [8]), ("1,3(x2)", [1, 3, 3]), ("", [])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("gpu[1-2]-ib,x", "gpu1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_ports_of_jobs() -> None:
    assert port_of("6.0") == SLURM_PORT
    assert len({port_of(f"{job}.{step}") for job in range(10) for step in range(3)}) == 30


def test_a_rank_that_is_told_cuda_says_in_a_line_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from shards.machine.process_group import device_of

    assert device_of(World(), "cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(WorldError, match=r"^The run is on cuda, which torch \S+ cannot use: \S.* HINT: .*doctor$"):
            device_of(World(), "cuda")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(WorldError) as refusal:
        device_of(World(rank=3, local_rank=1, world_size=4, local_world_size=2), "cuda")
    assert refusal.value.fact == "Rank 3 is to have card 1 of its node, and sees 1."
    assert refusal.value.hint.startswith("srun --gpus-per-node=N")
