"""A rank of models whose checkpoints are quantized already: `stored_program.py FOLDERS OUT`.

For each checkpoint in FOLDERS, whole and as split by each engine: the logits of a prompt, and bytes held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from launcher.config.engines import engines
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.blocks import local_tensor
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantized.stored import make_stored
from shards.machine.process_group import connect, disconnect
from shards.machine.world import World
from shards.model.quantization import Quantization
from shards.model.quantized_checkpoint import from_config
from shards.parallel.collectives import Collectives, collectives
from shards.parallel.fully_shard import fully_shard_model, reshard
from shards.parallel.products import quantize_layers
from shards.parallel.tensor_parallel import tensor_parallel_model

IDS = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]])


@torch.inference_mode()
def logits_and_bytes(
    folder: Path, form: Quantization, engine: str, world: World, ways: Collectives
) -> tuple[torch.Tensor, int]:
    model = build_meta(folder, torch.float32)
    if engine == "tensor_parallel":
        tensor_parallel_model(model, world.rank, world.world_size, ways)
    quantize_layers(model, make_stored(form, torch.float32, zeros_from=1), form.chooses)
    if engine == "fsdp":
        fully_shard_model(model, init_device_mesh("cpu", (world.world_size,)))
    load_weights(model, Checkpoint.open(folder), "cpu")
    logits = model(IDS).logits
    if engine == "fsdp":
        reshard(model)
    return logits, sum(local_tensor(parameter).nbytes for parameter in model.parameters())


def main() -> None:
    world = World.from_env(os.environ)
    connect(world, torch.device("cpu"))
    ways = collectives(world, torch.device("cpu"))
    results, whole = {}, {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        stored = from_config(json.loads((folder / "config.json").read_text()))
        assert stored is not None
        for engine in json.loads((folder / "engines.json").read_text()):
            form = engines()[engine].kept(stored)
            assert form is not None
            logits, held = logits_and_bytes(folder, form, engine, world, ways)
            difference = (logits - whole.setdefault(folder.name, logits)).abs().max().item()
            results[f"{folder.name} {engine}"] = {"difference": difference, "parameter_bytes": held}
    (Path(sys.argv[2]) / f"rank_{world.rank}.json").write_text(json.dumps(results))
    disconnect()


if __name__ == "__main__":
    main()
