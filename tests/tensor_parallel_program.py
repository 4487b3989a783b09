"""A rank of a tensor-parallel cut, started by torchrun: `tensor_parallel_program.py OUT`.

For each tiny model, whole and cut: greedy tokens of a ragged batch, and bytes held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from launcher.backend import Prompt
from launcher.config import SamplingConfig
from launcher.decode import Decoder, eos_token_ids
from launcher.measure import local_tensor
from launcher.models import EMBEDDED
from shards.checkpoint import Checkpoint
from shards.families import keep_kv_heads_only
from shards.load import build_meta, load_weights
from shards.process_group import connect, disconnect
from shards.tensor_parallel import tensor_parallel_model
from shards.world import World

PROMPTS = [Prompt(index, "", tuple(range(5, 9 + 3 * index))) for index in range(4)]


def answered(name: str, cut: bool, size: int) -> dict[str, Any]:
    model = build_meta(EMBEDDED / name, torch.float32)
    keep_kv_heads_only(model)
    if cut:
        tensor_parallel_model(model, init_device_mesh("cpu", (size,)))
    load_weights(model, Checkpoint.open(EMBEDDED / name), "cpu")
    decoder = Decoder(model, eos_token_ids(model), torch.device("cpu"), seed=0)
    made = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=12, ignore_eos=True), lambda _: None)
    local = [local_tensor(parameter) for parameter in model.parameters()]
    whole = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return {
        "tokens": [item.token_ids for item in made.completions],
        "parameter_bytes": sum(tensor.nbytes for tensor in local),
        "vector_bytes": sum(tensor.nbytes for tensor in whole),
        "cache_bytes": sum(decoder.kv_cache_bytes.values()),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
    }


def main() -> None:
    world = World.from_env(os.environ)
    connect(world, torch.device("cpu"))
    found = {
        name: {kind: answered(name, kind == "cut", world.world_size) for kind in ("whole", "cut")}
        for name in ("tiny_falcon", "tiny_llama")
    }
    (Path(sys.argv[1]) / f"rank_{world.rank}.json").write_text(json.dumps(found))
    disconnect()


if __name__ == "__main__":
    main()
