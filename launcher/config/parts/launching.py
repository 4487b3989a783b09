"""The start of ranks: on this machine, on several nodes, or as a SLURM job. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LaunchConfig:
    """How the ranks are started."""

    name: str = "local"  # local | slurm
    wait: bool = True  # slurm: follow the job to its end; False: return once it is submitted
    poll_s: float = 2.0  # slurm: seconds between two queries of the queue
    rendezvous: str | None = None  # local, several nodes: host:port of the first node, the same on all of them
    node_rank: int | None = None  # local, several nodes: the number of this node, from 0
    nccl_debug: bool = False  # NCCL writes to the ranks' logs how it connects them


@dataclass
class ClusterConfig:
    """Settings of a SLURM job; None and empty values are left out. Times are quoted strings in SLURM's format."""

    name: str = "default"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpus_flag: str = "gpus-per-node"  # gpus-per-node | gres | none
    gpu_type: str | None = None  # requested as gpus-per-node=TYPE:N or gres=gpu:TYPE:N
    device: str | None = None  # for the plan: the GPU, by its name in `python -m launcher.plan`
    cpus_per_task: int | None = None  # None: 4 per GPU of a task, or 1 without GPUs
    mem: str | None = None
    time: str | None = None
    exclusive: bool = False
    signal_s: int = 90  # seconds between the warning signal and the time limit; 0: no signal
    requeue: bool = True
    max_requeues: int = 10
    array_limit: int = 4  # jobs of a sweep that run at the same time, at most
    extra: list[str] = field(default_factory=list)  # additional options of sbatch, such as --mail-type=END
    srun: list[str] = field(default_factory=list)  # additional options of srun, such as --mpi=none
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)  # shell lines to run before the ranks
    container: list[str] = field(default_factory=list)  # prefix of the interpreter: apptainer exec --nv image.sif
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # interpreter on the nodes; None: the submitting one, or python3 in a container
