"""The rank of this process and the number of ranks, read from the environment that a launcher has set."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import WorldError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_DIGITS = 9
MOST_NODES = 100_000
DEFAULT_PORT = 29500  # torch.distributed's own default
MARKS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}  # only this launcher sets it
MPI = {  # prefix of RANK and SIZE -> local rank, local size; srun --mpi=pmi2 sets PMI_RANK, but not MPI_LOCALRANKID
    "OMPI_COMM_WORLD": ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MV2_COMM_WORLD": ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "PMI": ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among the ranks, with the names of torch.distributed."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    launcher: str = "alone"  # alone | torchrun | deepspeed | mpirun | srun | environment: set by hand or by others

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> World:
        """The world that torchrun, accelerate, deepspeed, mpirun or srun describe, or a world of one.

        Of nested launchers the innermost counts: torchrun inside srun, mpirun inside an allocation. A single task
        (`srun --pty bash`) is an interactive session, not a rank. WorldError if the variables contradict each other.
        """
        outer = _from_mpi(environ) or _from_srun(environ)
        world = _from_torch(environ, outer) or outer
        if world is None:
            return cls()
        return _checked(world)

    def environ(self) -> dict[str, str]:
        """The variables by which torch.distributed and every engine find this world."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def _from_torch(environ: Mapping[str, str], outer: World | None) -> World | None:
    """A rank of torchrun or a launcher built on it (accelerate launch), of DeepSpeed's launcher, or set by hand.

    None if `outer` started this process and the variables, if there are any, agree with it.
    """
    launcher = next((name for mark, name in MARKS.items() if mark in environ), "environment")
    if launcher == "environment" and outer is not None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # only the user can have set these
            if name in environ and environ[name] != outer.environ()[name]:
                raise WorldError(
                    f"{name}={environ[name]} is set, and {outer.launcher} says {name}={outer.environ()[name]}.",
                    f"unset {name}",
                )
        return None
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    size = _int(environ, "WORLD_SIZE")
    rank = _int(environ, "RANK")
    local_name = "LOCAL_WORLD_SIZE"
    if launcher == "deepspeed":
        local_name = "LOCAL_SIZE"
    default_rank = default_size = None
    if size == 1:
        default_rank, default_size = 0, 1
    local_rank = _int(environ, "LOCAL_RANK", default_rank)
    local_size = _int(environ, local_name, default_size)
    node = _int(environ, "GROUP_RANK", _int(environ, "CROSS_RANK", rank // max(local_size, 1)))
    nodes = _int(environ, "GROUP_WORLD_SIZE", _int(environ, "CROSS_SIZE", -(-size // max(local_size, 1))))
    address, port = _master(environ, launcher, size, local_size, DEFAULT_PORT)
    return World(rank, local_rank, size, local_size, node, nodes, address, port, launcher)


def _from_srun(environ: Mapping[str, str]) -> World | None:
    """A task of an srun step. A batch script or an salloc shell is not one: it has no step of its own."""
    if "SLURM_PROCID" not in environ or _int(environ, "SLURM_STEP_NUM_TASKS", 1) == 1:
        return None
    size, nodes = _int(environ, "SLURM_STEP_NUM_TASKS"), _int(environ, "SLURM_STEP_NUM_NODES")
    node, text = _int(environ, "SLURM_NODEID"), environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    tasks = tasks_per_node(text)
    if (len(tasks), sum(tasks)) != (nodes, size) or node >= nodes:
        raise WorldError(
            f"SLURM_STEP_NUM_TASKS={size}, SLURM_STEP_NUM_NODES={nodes}, SLURM_STEP_TASKS_PER_NODE={text} and "
            f"SLURM_NODEID={node} contradict each other.",
            "start the ranks with srun, and do not set SLURM_* by hand",
        )
    host = "127.0.0.1"
    if nodes > 1:
        host = first_host(environ.get("SLURM_STEP_NODELIST", ""))
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    return World(
        rank=_int(environ, "SLURM_PROCID"),
        local_rank=_int(environ, "SLURM_LOCALID"),
        world_size=size,
        local_world_size=tasks[node],
        node_rank=node,
        num_nodes=nodes,
        master_addr=environ.get("MASTER_ADDR") or host,
        master_port=_int(environ, "MASTER_PORT", port_of(step)),
        launcher="srun",
    )


def _from_mpi(environ: Mapping[str, str]) -> World | None:
    """A rank of Open MPI, MVAPICH, or the Hydra process manager (MPICH, Intel MPI).

    Ranks are taken to fill one node after the other, as mpirun places them by default.
    """
    prefix = next((prefix for prefix in MPI if f"{prefix}_RANK" in environ and MPI[prefix][0] in environ), None)
    if prefix is None or _int(environ, f"{prefix}_SIZE") == 1:
        return None
    local_rank, local_size = (_int(environ, name) for name in MPI[prefix])
    rank, size = _int(environ, f"{prefix}_RANK"), _int(environ, f"{prefix}_SIZE")
    if local_size < 1 or size % local_size:
        raise WorldError(
            f"mpirun started {size} ranks, and {local_size} of them on this node: not the same number on every node.",
            f"mpirun -np {size} with as many slots on each node (Open MPI: --map-by ppr:N:node; MPICH: -ppn N)",
        )
    seed = environ.get("PMIX_NAMESPACE")  # Open MPI's name of the job; Hydra has no such variable
    port = DEFAULT_PORT
    if seed is not None:
        port = port_of(seed)
    address, port = _master(environ, "mpirun", size, local_size, port)
    return World(rank, local_rank, size, local_size, rank // local_size, size // local_size, address, port, "mpirun")


def _master(environ: Mapping[str, str], launcher: str, size: int, local_size: int, port: int) -> tuple[str, int]:
    """The address of rank 0; WorldError if it may be on another node and the environment does not name it."""
    if local_size < size and not environ.get("MASTER_ADDR"):
        hint = "export MASTER_ADDR=<host of rank 0>"
        if launcher == "mpirun":
            hint = f"mpirun -x MASTER_ADDR=<host of rank 0> (MPICH, Intel MPI: -genv MASTER_ADDR <host>); port {port}"
        raise WorldError(f"There are {size} ranks, {local_size} on this node, and MASTER_ADDR is not set.", hint)
    return environ.get("MASTER_ADDR") or "127.0.0.1", _int(environ, "MASTER_PORT", port)


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
    if not 0 <= world.node_rank < world.num_nodes:
        raise WorldError(
            f"Node {world.node_rank} is not one of {world.num_nodes} nodes.", "start all ranks with one launcher"
        )
    return world


def _int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        given = [key for key in ("RANK", "WORLD_SIZE") if key in environ]
        if not given:
            raise WorldError(f"No {name} in the environment.", "start the ranks with one launcher")
        known = " ".join(f"{key}={environ[key]}" for key in given)
        raise WorldError(
            f"{known} and no {name} in the environment.", f"unset {' '.join(given)}, or start with torchrun"
        )
    try:
        return int(text)
    except ValueError:
        raise WorldError(f"{name}={text!r} is not a number.", f"unset {name}, or let a launcher set it") from None


def port_of(name: str) -> int:
    """A port for the job of this name: the same for all its ranks, most likely different for other jobs."""
    return 15000 + zlib.crc32(name.encode()) % 10000


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form: "2(x3),1" is [2, 2, 2, 1]; WorldError for more than MOST_NODES nodes."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        if max(len(count), len(times)) > MAX_DIGITS or len(counts) + int(times or 1) > MOST_NODES:
            fact = f"SLURM_STEP_TASKS_PER_NODE={text[:80]} is of more than {MOST_NODES:,} nodes."
            raise WorldError(fact, "unset SLURM_STEP_TASKS_PER_NODE")
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first host of SLURM's short form: "gpu[07-09,12],cpu1" is gpu07, "rack[1-2]n[3-4]" is rack1n3."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first:
        return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
    return nodelist
