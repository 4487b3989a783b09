"""The process group of a run: gloo for CPU tensors, NCCL for CUDA tensors."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shards.errors import WorldError
from shards.machine.cards import SEE_ALL_CARDS
from shards.machine.network import network_of

GROUP_S = 1800.0
GLOO_TRIES = 5  # gloo's attempts to connect to all others; each takes up to the timeout
UNREACHABLE = (
    "let the nodes reach each other on all ports, or GLOO_SOCKET_IFNAME= and NCCL_SOCKET_IFNAME= another interface"
)

if TYPE_CHECKING:
    from shards.machine.network import Network
    from shards.machine.world import World


def device_of(world: World, accelerator: str) -> torch.device:
    """The device of this rank: the GPU of its local rank, or the CPU. WorldError if torch cannot use that GPU."""
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


def connect(world: World, device: torch.device, join_s: float = GROUP_S, timeout_s: float = GROUP_S) -> None:
    """Join the group of all ranks, if there is more than one and this process has not joined yet.

    WorldError, with the address and the interface, if the ranks have not connected within `join_s`; `timeout_s` is the
    time limit of later collectives. The variables of `world.environ()` must be in the environment.
    """
    if world.world_size == 1 or dist.is_initialized():
        return
    network = network_of(world, os.environ, device.type)
    address = f"rank 0 at {world.master_addr}:{world.master_port} from {network} within {join_s:g} s"
    limit = timedelta(seconds=join_s)
    try:
        store = _store(world, limit)
    except dist.DistError as error:
        raise WorldError(f"Rank {world.rank} did not reach {address}: {_first_line(error)}", UNREACHABLE) from error
    store.set(f"rank_{world.rank}", "here")
    keys = [f"rank_{rank}" for rank in range(world.world_size)]
    try:
        store.wait(keys, limit)
    except dist.DistError:
        if names := ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key])):
            fact = f"Rank {world.rank} reached {address}, and ranks {names} did not."
            raise WorldError(fact, UNREACHABLE) from None
    try:
        kind = "gloo"
        if device.type == "cuda":
            kind = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            kind, store=store, rank=world.rank, world_size=world.world_size, timeout=limit / GLOO_TRIES
        )
    except RuntimeError as error:
        raise _unconnected(world, network, error) from error
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))


def connect_cards(world: World, device: torch.device, join_s: float) -> None:
    """Make NCCL connect the GPUs of several nodes now, instead of at its first use. WorldError if that fails within
    `join_s`; on a single node nothing is done."""
    if device.type == "cuda" and world.num_nodes > 1:
        try:
            dist.all_reduce(torch.zeros(1, device=device), async_op=True).wait(timedelta(seconds=join_s))
        except RuntimeError as error:
            raise _unconnected(world, network_of(world, os.environ, device.type), error) from error


def _unconnected(world: World, network: Network, error: RuntimeError) -> WorldError:
    fact = f"Rank {world.rank} over {network} could not connect to all others: {_first_line(error)}"
    return WorldError(fact, UNREACHABLE)


def _store(world: World, limit: timedelta) -> dist.Store:
    """The store through which the ranks connect: torchrun's if it started them, otherwise one of rank 0."""
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        world.master_addr,
        world.master_port,
        world.world_size,
        is_master=world.rank == 0 and not is_torchruns,
        timeout=limit,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore("launcher", store)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def barrier() -> None:
    """Wait for all ranks, on the host; returns at once with a single rank."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def any_rank(flag: bool) -> bool:
    """True if the flag is set on some rank; every rank must call it."""
    if not dist.is_initialized():
        return flag
    vote = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return bool(vote.item())


def from_rank_0(value: Any) -> Any:
    """Broadcast a value from rank 0."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def disconnect() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()
