"""Which rank am I, among how many: read from the environment that a launcher left."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import WorldError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PORT = 29500  # torch.distributed's own default


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among the ranks, in the words of torch.distributed."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    launcher: str = "alone"  # alone | torchrun | deepspeed | srun | mpirun

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> World:
        """The world that torchrun, accelerate, deepspeed, srun or mpirun describe, or a world of one.

        Raises WorldError where the variables contradict each other.
        """
        for read in (_from_torch, _from_srun, _from_mpi):
            world = read(environ)
            if world is not None:
                return _checked(world)
        return cls()

    def environ(self) -> dict[str, str]:
        """The variables by which torch.distributed and every engine find this world."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def _from_torch(environ: Mapping[str, str]) -> World | None:
    """torchrun and what is built on it (accelerate launch), and DeepSpeed's launcher."""
    present = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if not present:
        return None
    if len(present) == 1:
        missing = ({"RANK", "WORLD_SIZE"} - set(present)).pop()
        raise WorldError(f"{present[0]} is set and {missing} is not.", f"unset {present[0]}, or start with torchrun")
    rank, size = _int(environ, "RANK"), _int(environ, "WORLD_SIZE")
    local_size = _int(environ, "LOCAL_WORLD_SIZE", _int(environ, "LOCAL_SIZE", size))
    if "LOCAL_RANK" not in environ and size > 1:
        raise WorldError(f"RANK={rank} and WORLD_SIZE={size} are set and LOCAL_RANK is not.", "start with torchrun")
    node = _int(environ, "GROUP_RANK", _int(environ, "CROSS_RANK", rank // max(local_size, 1)))
    return World(
        rank=rank,
        local_rank=_int(environ, "LOCAL_RANK", 0),
        world_size=size,
        local_world_size=local_size,
        node_rank=node,
        num_nodes=_int(environ, "GROUP_WORLD_SIZE", _int(environ, "CROSS_SIZE", -(-size // max(local_size, 1)))),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_int(environ, "MASTER_PORT", DEFAULT_PORT),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed",
    )


def _from_srun(environ: Mapping[str, str]) -> World | None:
    """A task of an srun step. A batch script or an salloc shell is not one: it has no step of its own."""
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    size, nodes = _int(environ, "SLURM_STEP_NUM_TASKS"), _int(environ, "SLURM_STEP_NUM_NODES", 1)
    node = _int(environ, "SLURM_NODEID", 0)
    return World(
        rank=_int(environ, "SLURM_PROCID"),
        local_rank=_int(environ, "SLURM_LOCALID", 0),
        world_size=size,
        local_world_size=tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(-(-size // nodes))))[node],
        node_rank=node,
        num_nodes=nodes,
        master_addr=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        master_port=_int(environ, "MASTER_PORT", 15000 + _int(environ, "SLURM_JOB_ID", 0) % 10000),
        launcher="srun",
    )


def _from_mpi(environ: Mapping[str, str]) -> World | None:
    """Open MPI's and the Hydra process manager's (MPICH, Intel MPI) variables."""
    for rank, size, local_rank, local_size in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if rank in environ and size in environ:
            break
    else:
        return None
    total = _int(environ, size)
    local = _int(environ, local_size, total)
    if local < total and "MASTER_ADDR" not in environ:
        raise WorldError(
            f"mpirun started {total} ranks, {local} on this node, and MASTER_ADDR is not set.",
            "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500",
        )
    return World(
        rank=_int(environ, rank),
        local_rank=_int(environ, local_rank, _int(environ, rank)),
        world_size=total,
        local_world_size=local,
        node_rank=_int(environ, rank) // max(local, 1),
        num_nodes=-(-total // max(local, 1)),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_int(environ, "MASTER_PORT", DEFAULT_PORT),
        launcher="mpirun",
    )


def _checked(world: World) -> World:
    if world.world_size < 1 or not 0 <= world.rank < world.world_size:
        raise WorldError(
            f"RANK={world.rank} is not a rank of WORLD_SIZE={world.world_size}.",
            f"RANK is 0 to {max(world.world_size - 1, 0)}; unset RANK and WORLD_SIZE to run alone",
        )
    if not 0 <= world.local_rank < world.local_world_size <= world.world_size:
        raise WorldError(
            f"LOCAL_RANK={world.local_rank}, LOCAL_WORLD_SIZE={world.local_world_size} and "
            f"WORLD_SIZE={world.world_size} contradict each other.",
            "start all ranks with one launcher, for example torchrun",
        )
    return world


def _int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise WorldError(f"{name}={text!r} is not a number.", f"unset {name}, or let a launcher set it") from None


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first host of SLURM's short form: "gpu[07-09,12],cpu1" is gpu07."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    return (found.group(1) + (found.group(2) or "")) if found else nodelist
