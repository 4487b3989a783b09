"""The start of ranks: on this machine, on several nodes, or as a SLURM job. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LaunchConfig:
    """The way of starting the ranks."""

    name: str = "local"  # local | slurm
    wait: bool = True  # slurm: follow the job to its end; False: return once it is submitted
    poll_s: float = 2.0  # slurm: time between two looks at the queue
    rendezvous: str | None = None  # local, several nodes: host:port of the first node, the same on all of them
    node_rank: int | None = None  # local, several nodes: the number of this node, from 0
    nccl_debug: bool = False  # NCCL tells in the ranks' logs how it connects them


@dataclass
class ClusterConfig:
    """Settings of a SLURM job; None and empty values are left out. Times as SLURM writes them, in quotes."""

    name: str = "default"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpus_flag: str = "gpus-per-node"  # gpus-per-node | gres | none
    gpu_type: str | None = None  # asked for as gpus-per-node=TYPE:N or gres=gpu:TYPE:N
    device: str | None = None  # the card as `python -m launcher.plan` names it, for the plan
    cpus_per_task: int | None = None  # None: 4 for each card of a task, 1 where there are none
    mem: str | None = None
    time: str | None = None
    exclusive: bool = False
    signal_s: int = 90  # warning before the time limit; 0: none
    requeue: bool = True
    max_requeues: int = 10
    array_limit: int = 4  # jobs of a sweep that run at once
    extra: list[str] = field(default_factory=list)  # further options of sbatch, as --mail-type=END
    srun: list[str] = field(default_factory=list)  # further options of srun, as --mpi=none
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)  # lines of shell before the ranks
    container: list[str] = field(default_factory=list)  # words before the interpreter, as apptainer exec --nv image.sif
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # interpreter on the nodes; None: the one that submits, in a container python3
