"""One rank of a Fabric run over a folder of checkpoints: what it held and what it answered, as rank_R.json in it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shards.checkpoint.checkpoint import Checkpoint
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.parallel.fully_shard import bookkeeping_entries, fully_shard_model, reset_bookkeeping, reshard


class LargestHostTensor(TorchDispatchMode):
    """Notes tensors off meta that are as large as a whole parameter."""

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
    world_size = int(os.environ["WORLD_SIZE"])
    report = {folder.name: answer(folder, world_size) for folder in sorted(root.iterdir()) if folder.is_dir()}
    (root / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
