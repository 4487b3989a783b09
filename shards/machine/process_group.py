"""The process group of a run: gloo for CPU tensors, NCCL for CUDA tensors."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shards.errors import WorldError
from shards.machine.cards import SEE_ALL_CARDS

if TYPE_CHECKING:
    from shards.machine.world import World


def device_of(world: World, accelerator: str) -> torch.device:
    """The device of this rank: the card of its local rank, or the CPU. WorldError where torch cannot use that card."""
    if accelerator == "cpu":
        return torch.device("cpu")
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        raise WorldError(
            f"The run is on cuda, which torch {torch.__version__} cannot use: {str(error).splitlines()[0]}",
            "accelerator=cpu, or see python -m launcher.doctor",
        ) from error
    if world.local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"Rank {world.rank} is to have card {world.local_rank} of its node, and sees {torch.cuda.device_count()}.",
            SEE_ALL_CARDS,
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def connect(world: World, device: torch.device, timeout_s: float = 1800) -> None:
    """Join the group of all ranks, if there is more than one and this process has not joined yet.

    The variables of `world.environ()` are in the environment.
    """
    if world.world_size > 1 and not dist.is_initialized():
        kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            kind, rank=world.rank, world_size=world.world_size, timeout=timedelta(seconds=timeout_s)
        )


def barrier() -> None:
    """Wait for all ranks, on the host; nothing to wait for in a world of one."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; every rank must ask."""
    if not dist.is_initialized():
        return flag
    vote = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return bool(vote.item())


def from_rank_0(value: Any) -> Any:
    """The value that rank 0 has."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def disconnect() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()
