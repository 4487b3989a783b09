"""All-reduce and all-gather of tensors: through shared memory on one machine, between GPUs, or by the process group."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from shards.machine.process_group import any_rank, barrier, from_rank_0
from shards.machine.shared_memory import OPERATORS, SHARED_MEMORY, missing_operators

if TYPE_CHECKING:
    from shards.machine.world import World

ONE_SHOT_BYTES = 256 << 10
"""Up to this size each GPU reads the data of all others, in one step; above it NCCL's rings move less."""


@dataclass(frozen=True, slots=True)
class Collectives:
    """`add_up(tensor)` sums a contiguous tensor over the ranks in place; `gather(out, part)` concatenates the parts of
    all ranks.

    `way` names the implementation, and why a faster one is not used. `is_immediate` is True if the ranks copy the data
    themselves, so that prefetching gains nothing. `meet` is a barrier. `room(nbytes)` returns a tensor of bytes that
    all ranks of a node read and write; None if there is no memory for it.

    With three ranks or more, sums may differ in their last bits from rank to rank; gathered tensors never do.
    """

    way: str
    add_up: Callable[[torch.Tensor], object]
    gather: Callable[[torch.Tensor, torch.Tensor], object]
    is_immediate: bool = False
    meet: Callable[[], object] = barrier
    room: Callable[[int], torch.Tensor | None] = lambda nbytes: None


def collectives(world: World, device: torch.device, within_node: bool = False) -> Collectives:
    """The fastest implementation that all ranks support, over all ranks or (`within_node`) over those of each node.

    Every rank must call it after joining the process group. Within a node there is only `gather`, and only through
    shared memory: the process group contains all ranks.
    """
    on_one_node = within_node or world.local_world_size == world.world_size
    if device.type != "cpu":
        return _between_cards(world, device) if on_one_node and not within_node else _of_group("NCCL")
    obstacle = _obstacle(world) if on_one_node else f"the ranks are on {world.num_nodes} nodes"
    if any_rank(obstacle is not None):
        return _of_group(f"gloo, since {obstacle or 'another rank cannot use shared memory'}")
    return _through_shared_memory(world)


def _of_group(way: str) -> Collectives:
    return Collectives(way, dist.all_reduce, dist.all_gather_into_tensor)


def _obstacle(world: World) -> str | None:
    """The reason why the ranks of this node cannot use vLLM's operators; None after loading them, without vLLM."""
    if torch.version.cuda is not None:
        return "this torch is a build for CUDA, and the operators for shared memory are of vLLM's build for CPUs"
    if missing := missing_operators(world.local_world_size, torch.get_num_threads()):
        return missing
    # The library that vLLM chooses for this CPU. Source: import_kernels in vllm/platforms/cpu.py.
    library = "_C_AVX2"
    if not torch.cpu._is_avx2_supported() or torch.cpu._is_avx512_bf16_supported():
        library = "_C"
    elif torch.cpu._is_avx512_supported():
        library = "_C_AVX512"
    spec = importlib.util.find_spec(OPERATORS)
    assert spec is not None
    folder = Path((spec.submodule_search_locations or ["."])[0])
    try:
        torch.ops.load_library(folder / f"{library}.abi3.so")
    except OSError as error:
        return f"vLLM's operators do not load: {str(error).strip().splitlines()[0]}"
    for name in ("init_shm_manager", "join_shm_manager", "shm_allreduce", "shm_all_gather"):
        if not hasattr(torch.ops._C, name):
            return f"this vLLM has no {name}"
    return None


def _through_shared_memory(world: World) -> Collectives:
    """Collectives over a segment for each rank of this node. The segments are unlinked as soon as all ranks have mapped
    them, so that they disappear with the last rank."""
    name = from_rank_0(f"launcher_{secrets.token_hex(6)}") + f"_{world.node_rank}"
    threads = torch.tensor([torch.get_num_threads()])
    dist.all_reduce(threads, dist.ReduceOp.MIN)
    handle = torch.ops._C.init_shm_manager(name, world.local_world_size, world.local_rank, int(threads))
    barrier()
    torch.ops._C.join_shm_manager(handle, name)
    unlink_segment(f"{name}_{world.local_rank}")
    operators = torch.ops._C

    def add_up(tensor: torch.Tensor) -> None:
        operators.shm_allreduce(handle, tensor)

    def gather(out: torch.Tensor, part: torch.Tensor) -> None:
        if part.is_floating_point():
            operators.shm_all_gather(handle, part, out)
        elif part.nbytes % 4 == 0:  # the operator only copies, but refuses integers
            operators.shm_all_gather(handle, part.view(torch.float32), out.view(torch.float32))
        else:
            dist.all_gather_into_tensor(out, part)

    token = torch.zeros(16)

    def meet() -> None:
        operators.shm_allreduce(handle, token)

    return Collectives("shared memory", add_up, gather, True, meet, lambda nbytes: _common_room(world, nbytes))


def _common_room(world: World, nbytes: int) -> torch.Tensor | None:
    """Shared memory of the ranks of this node, initially zeros. It is unlinked as soon as all ranks have mapped it."""
    name = from_rank_0(f"launcher_{secrets.token_hex(6)}") + f"_{world.node_rank}"
    path, obstacle = SHARED_MEMORY / name, False
    if world.local_rank == 0:
        try:
            with path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError:  # no space left
            obstacle = True
            path.unlink(missing_ok=True)
    if any_rank(obstacle):
        return None
    room = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)
    unlink_segment(name)
    return room


def unlink_segment(name: str) -> None:
    """Unlink this rank's shared memory after every rank has mapped it."""
    barrier()
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def _between_cards(world: World, device: torch.device) -> Collectives:
    """All-reduce in one step for small tensors, if the GPUs can access each other's memory; everything else by NCCL."""
    if not all(
        torch.cuda.can_device_access_peer(device.index, other)
        for other in range(world.local_world_size)
        if other != device.index
    ):
        return _of_group("NCCL, since the cards cannot read each other's memory")
    try:
        buffer = symmetric_memory.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
        symmetric_memory.rendezvous(buffer, dist.group.WORLD)
        obstacle = None
    except (RuntimeError, TypeError, AttributeError) as error:
        obstacle = str(error).strip().splitlines()[0]
    if any_rank(obstacle is not None):
        return _of_group(f"NCCL, since torch has no symmetric memory here: {obstacle or 'on another rank'}")

    def add_up(tensor: torch.Tensor) -> None:
        if tensor.nbytes > ONE_SHOT_BYTES or tensor.nbytes % 16 or tensor.dtype not in (torch.float32, torch.bfloat16):
            dist.all_reduce(tensor)
            return
        shared = buffer[: tensor.nbytes].view(tensor.dtype)
        group = dist.group.WORLD.group_name
        total = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, tensor.view(-1), "sum", group)
        tensor.view(-1).copy_(total)

    return Collectives("one-shot, and NCCL above 256 KiB", add_up, dist.all_gather_into_tensor)
