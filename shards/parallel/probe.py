"""The rates behind `shards.plan.roofline`, measured here: memory, matmul, and the link between the real ranks.

`python -m shards.parallel.probe cpu|cuda` is one rank; rank 0 prints the figures as one line of JSON. Takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from shards.machine.cards import count_as_nvml, cuda_devices
from shards.machine.hardware import CPU, MIB, Device, Link
from shards.machine.process_group import barrier, connect, device_of, disconnect
from shards.machine.rates import Measured
from shards.machine.world import World
from shards.parallel.collectives import collectives

if TYPE_CHECKING:
    from collections.abc import Callable

REPEATS = 7
READ_BYTES = {"cpu": 256 * MIB, "cuda": 4096 * MIB}
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
GATHER_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
REDUCE_BYTES = 16 * 1024
REDUCE_REPEATS = 50


def probe(world: World, device: torch.device) -> Measured:
    """Measure with all ranks at once: they share the memory of a CPU, and switches and links of GPUs."""
    known = CPU
    if device.type == "cuda":
        known = cuda_devices(os.environ)[world.local_rank]
    barrier()
    bandwidth = memory_bandwidth(device)
    barrier()
    flops_16, flops_32 = matmul_rate(device, torch.bfloat16), matmul_rate(device, torch.float32)
    link = None
    if world.world_size > 1:
        link = link_rates(world, device)
    rated: Device = replace(known, bandwidth=bandwidth, flops_16=flops_16, flops_32=flops_32)
    return Measured(rated, world.world_size, link)


@torch.no_grad()
def memory_bandwidth(device: torch.device) -> float:
    """Bytes/s of whichever is faster: reading a matrix for a product with a vector, or a copy (read and written)."""
    columns = 4096
    rows = READ_BYTES[device.type] // (4 * columns)
    matrix = torch.ones(rows, columns, device=device)
    vector, result = torch.ones(columns, device=device), torch.empty(rows, device=device)
    read = matrix.nbytes / best_s(lambda: torch.mv(matrix, vector, out=result), device)
    other = torch.empty_like(matrix)
    return max(read, 2 * matrix.nbytes / best_s(lambda: other.copy_(matrix), device))


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square product of random numbers, a multiply-add counted as two.

    Equal numbers flip few bits, take less power, and let a card run at a clock that no model sees.
    """
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / best_s(lambda: torch.mm(left, right, out=result), device)


def link_rates(world: World, device: torch.device) -> Link:
    """Bytes/s that a rank receives in an all-gather and seconds of a small all-reduce, with the collectives that the
    engines here use."""
    ways = collectives(world, device)
    part = torch.ones(GATHER_BYTES[device.type] // 4, device=device)
    whole = torch.empty(part.numel() * world.world_size, device=device)
    gather_s = best_s(lambda: ways.gather(whole, part), device)
    small = torch.ones(REDUCE_BYTES // 4, device=device)
    reduce_s = best_s(lambda: ways.add_up(small.fill_(1)), device, REDUCE_REPEATS)
    way = "NCCL"
    if device.type == "cpu":
        way = ways.way.partition(",")[0]
    name = f"{world.world_size} ranks over {way}"
    return Link(name, (world.world_size - 1) * part.nbytes / gather_s, reduce_s)


def best_s(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The shortest time of several calls, after one warm-up call; on a GPU until it has finished."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(accelerator: str) -> None:
    """Run one rank, in the world that the environment describes."""
    world = World.from_env(os.environ)
    count_as_nvml(os.environ)
    device = device_of(world, accelerator)
    connect(world, device, join_s=120, timeout_s=120)
    try:
        measured = probe(world, device)
    finally:
        disconnect()
    if world.rank == 0:
        print(json.dumps(measured.to_dict()))


if __name__ == "__main__":
    main(sys.argv[1])
