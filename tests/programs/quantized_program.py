"""A rank of quantized models: `quantized_program.py OUT`.

For each embedded model and quantization, whole and as split by each engine: greedy tokens, and bytes held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from launcher.backends.base import Prompt
from launcher.backends.decode import Decoder
from launcher.config.engines import engines
from launcher.config.schema import SamplingConfig
from launcher.models import EMBEDDED
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.blocks import local_tensor
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantized.quantizers import make_quantizer
from shards.machine.process_group import connect, disconnect
from shards.machine.world import World
from shards.parallel.collectives import Collectives, collectives
from shards.parallel.families import keep_kv_heads_only
from shards.parallel.fully_shard import fully_shard_model, reshard
from shards.parallel.products import quantize_layers
from shards.parallel.tensor_parallel import tensor_parallel_model

PROMPTS = [Prompt(index, "", tuple(range(5, 9 + 3 * index))) for index in range(2)]


def answered(model_name: str, quantization: str, engine: str, world: World, ways: Collectives) -> dict[str, Any]:
    folder = EMBEDDED / model_name
    model = build_meta(folder, torch.float32)
    keep_kv_heads_only(model)
    if engine == "tensor_parallel":
        tensor_parallel_model(model, world.rank, world.world_size, ways)
    quantize_layers(model, make_quantizer(quantization, torch.float32))
    if engine == "fsdp":
        fully_shard_model(model, init_device_mesh("cpu", (world.world_size,)))
    load_weights(model, Checkpoint.open(folder), "cpu")
    decoder = Decoder(model, (), torch.device("cpu"), seed=0)
    made = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=8, ignore_eos=True), lambda _: None)
    if engine == "fsdp":
        reshard(model)
    held = sum(local_tensor(parameter).nbytes for parameter in model.parameters())
    return {"tokens": [item.token_ids for item in made.completions], "parameter_bytes": held}


def main() -> None:
    world = World.from_env(os.environ)
    connect(world, torch.device("cpu"))
    ways = collectives(world, torch.device("cpu"))
    results = {
        f"{model} {quantization} {engine}": answered(model, quantization, engine, world, ways)
        for model in ("tiny_falcon", "tiny_llama")
        for engine in ("transformers", "tensor_parallel", "fsdp")
        for quantization in engines()[engine].quantizations
    }
    (Path(sys.argv[1]) / f"rank_{world.rank}.json").write_text(json.dumps(results))
    disconnect()


if __name__ == "__main__":
    main()
