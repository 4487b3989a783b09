"""Which rank am I, among how many: read from the environment that a launcher left."""

from __future__ import annotations

from dataclasses import dataclass


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
    master_port: int = 0
    launcher: str = "alone"  # alone | torchrun | srun | mpirun | deepspeed | accelerate
