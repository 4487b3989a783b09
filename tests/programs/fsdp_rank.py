"""One rank of a Fabric run over a folder of checkpoints: writes its tokens and bytes to rank_R.json in that folder.

Four ranks count as two nodes of two ranks each; each node has the whole model.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shards.checkpoint.checkpoint import Checkpoint
from shards.engines.fsdp import FsdpPlanner
from shards.load.blocks import local_bytes
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.machine.world import World
from shards.model.known_shape import known_shape
from shards.parallel import products
from shards.parallel.collectives import collectives
from shards.parallel.fully_shard import bookkeeping_entries, fully_shard_model, reset_bookkeeping, reshard
from shards.parallel.products import pack_weights
from shards.plan.memory import make_layout
from shards.plan.request import PlanRequest


class LargestHostTensor(TorchDispatchMode):
    """Records tensors outside the meta device that are as large as a whole parameter."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.seen = limit, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = out._local_tensor if isinstance(out, DTensor) else out
        if isinstance(held, torch.Tensor) and not held.is_meta and held.untyped_storage().nbytes() > self.limit:
            self.seen.append(f"{func} {tuple(held.shape)}")
        return out


class Gathers(TorchDispatchMode):
    """Counts the all-gathers of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.c10d._allgather_base_.default
        return func(*args, **(kwargs or {}))


def greedy(model: nn.Module) -> list[int]:
    ids = torch.arange(1, 11).view(1, -1)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    tokens: list[int] = ids[0].tolist()
    return tokens


def resident(folder: Path, world: World, layers: int) -> dict[str, Any]:
    """The model with `layers` resident layers, as in the engine: tokens, held bytes and planned bytes."""
    is_hybrid = world.num_nodes > 1
    ways = collectives(world, torch.device("cpu"), within_node=is_hybrid)
    names = ("replicate", "shard") if is_hybrid else ("shard",)
    sizes = (world.num_nodes, world.local_world_size) if is_hybrid else (world.world_size,)
    model = build_meta(folder, torch.float32)
    fully_shard_model(model, init_device_mesh("cpu", sizes, mesh_dim_names=names), layers, ways)
    load_weights(model, Checkpoint.open(folder), "cpu")
    held = local_bytes(model)
    shape = known_shape(json.loads((folder / "config.json").read_text()))
    request = PlanRequest(
        shape=shape, engine=FsdpPlanner(resident_layers=layers, within_node=is_hybrid), dtype_bytes=4,
        devices=world.local_world_size, num_nodes=world.num_nodes,
    )  # fmt: skip
    pack_weights(model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return {
        "way": ways.way, "tokens": greedy(model), "held": held - buffers,
        "planned": make_layout(request).parameter_bytes[world.rank],
    }  # fmt: skip


def offloaded(folder: Path, world: World) -> list[int]:
    """The tokens with shards in main memory, by FSDP2's own offload policy."""
    model = build_meta(folder, torch.float32)
    fully_shard_model(model, init_device_mesh("cpu", (world.world_size,)), offload=True)
    load_weights(model, Checkpoint.open(folder), "cpu")
    return greedy(model)


def answer(folder: Path, world_size: int) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    largest = max(entry.nbytes for entry in checkpoint.tensors.values())
    watch, stats = LargestHostTensor(int(largest * 1.05 / world_size)), []

    def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
        sharded = fully_shard_model(model, mesh["data_parallel"])
        stats.append(load_weights(sharded, checkpoint, "cpu"))
        return sharded

    strategy = ModelParallelStrategy(parallelize, data_parallel_size=world_size, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.launch()
    with watch:
        model = fabric.setup(build_meta(folder, torch.float32))
    inner = model.module
    with Gathers() as gathers:
        tokens = greedy(model)
    notes = bookkeeping_entries(inner)
    reset_bookkeeping(inner)
    reshard(inner)
    return {
        "tokens": tokens,
        "gathers": gathers.count,
        "notes": notes,
        "notes_after_reset": bookkeeping_entries(inner),
        "whole_on_cpu": watch.seen,
        "tied": inner.get_output_embeddings().weight is inner.get_input_embeddings().weight,
        "share": sum(parameter.to_local().nbytes for parameter in inner.parameters()) / checkpoint.nbytes,
        "bytes_read": stats[0].bytes_read,
        "total": checkpoint.nbytes,
    }


def main() -> None:
    root = Path(sys.argv[1])
    world = World.from_env(os.environ)
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    if world.world_size == 4:
        world = replace(world, local_rank=world.rank % 2, local_world_size=2, node_rank=world.rank // 2, num_nodes=2)
        dist.init_process_group("gloo")
        report: dict[str, Any] = {folder.name: {} for folder in folders}
    else:
        report = {folder.name: answer(folder, world.world_size) for folder in folders}
    products.LEAST_VALUES[torch.float32] = 1  # pack weights even of these small matrices, for which it does not pay
    for folder in folders:
        report[folder.name]["offloaded"] = offloaded(folder, world)
        report[folder.name]["resident"] = [resident(folder, world, count) for count in range(4)]
    (root / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
