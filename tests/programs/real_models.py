"""Builds models as transformers, FSDP2, AutoTP and our own tensor parallelism do, and prints their sizes as JSON.

real_models.py < {"parameters": [config, ...], "fsdp": {name: [config, [size, ...]], ...},
                  "tensor_parallel": [[config, size], ...], "deepspeed": [[config, size], ...]}

"parameters": names and shapes of each model. "fsdp": bytes of parameters by model, world size and rank.
"tensor_parallel" and "deepspeed": the number of parameters of each rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shards.load.meta import build_meta
from shards.parallel.collectives import Collectives
from shards.parallel.fully_shard import fully_shard_model
from shards.parallel.tensor_parallel import tensor_parallel_model

NO_COLLECTIVES = Collectives("none: only the shapes are of interest", lambda tensor: None, lambda out, part: None)


def parameters(configs: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    return [
        {name: list(parameter.shape) for name, parameter in build_meta(config, torch.bfloat16).named_parameters()}
        for config in configs
    ]


def ranks(world_size: int) -> list[int]:
    """The first rank, one in the middle, and the last, whose shard may be smaller or empty."""
    return sorted({0, world_size // 2, world_size - 1})


def fsdp(configs: dict[str, tuple[dict[str, Any], list[int]]]) -> dict[str, dict[str, dict[str, int]]]:
    return {
        name: {str(size): {str(rank): fsdp_bytes(config, size, rank) for rank in ranks(size)} for size in sizes}
        for name, (config, sizes) in configs.items()
    }


def fsdp_bytes(config: dict[str, Any], world_size: int, rank: int) -> int:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        model = build_meta(config, torch.bfloat16)
        fully_shard_model(model, init_device_mesh("cpu", (world_size,)))
        return sum(parameter.to_local().nbytes for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def tensor_parallel(cases: list[tuple[dict[str, Any], int]]) -> list[list[int]]:
    return [[tensor_parallel_numel(config, size, rank) for rank in range(size)] for config, size in cases]


def tensor_parallel_numel(config: dict[str, Any], size: int, rank: int) -> int:
    model = tensor_parallel_model(build_meta(config, torch.bfloat16), rank, size, NO_COLLECTIVES)
    return sum(parameter.numel() for parameter in model.parameters())


def deepspeed(cases: list[tuple[dict[str, Any], int]]) -> list[list[int]]:
    """The number of parameters of each rank, each in a new process, since DeepSpeed never gives up its process groups.
    The processes are forks, which saves the imports."""
    from launcher.backends.deepspeed.all_reduce import compile_operation

    assert compile_operation() is None  # otherwise init_inference would compile the operation to another place
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return [[pool.apply(autotp_numel, (config, size, rank)) for rank in range(size)] for config, size in cases]


def autotp_numel(config: dict[str, Any], size: int, rank: int) -> int:
    """The number of parameters of one rank by AutoTP. LOCAL_SIZE is wrong on purpose: it keeps the shared-memory
    all-reduce from waiting for the other ranks, which do not exist."""
    import deepspeed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE="0")
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    model = build_meta(config, torch.bfloat16)
    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": size}, dtype=torch.bfloat16)
    return sum(parameter.numel() for parameter in engine.module.parameters())


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    made = {"parameters": parameters(asked["parameters"]), "fsdp": fsdp(asked["fsdp"])}
    made["tensor_parallel"] = tensor_parallel(asked["tensor_parallel"])
    if asked["deepspeed"]:
        made["deepspeed"] = deepspeed(asked["deepspeed"])
    print("\n" + json.dumps(made))
