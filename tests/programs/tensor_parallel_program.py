"""A rank of tensor-parallel models: `tensor_parallel_program.py OUT`.

For each model, whole and split: greedy tokens of a ragged batch, gaps between the top two logits, and bytes held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.backends.base import Prompt
from launcher.backends.decode import Decoder
from launcher.config.schema import SamplingConfig
from launcher.models import EMBEDDED
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.blocks import local_block, stored_tensors
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.random_weights import fill_random
from shards.machine.process_group import connect, disconnect
from shards.machine.world import World
from shards.parallel import products
from shards.parallel.collectives import Collectives, collectives
from shards.parallel.families import keep_kv_heads_only
from shards.parallel.products import fuse_projections, pack_weights
from shards.parallel.tensor_parallel import tensor_parallel_model

PROMPTS = [Prompt(index, "", tuple(range(5, 9 + 3 * index))) for index in range(4)]
SMALL = {"vocab_size": 131, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 200}
MODELS: dict[str, Path | dict[str, Any]] = {
    "tiny_falcon": EMBEDDED / "tiny_falcon",
    "tiny_llama": EMBEDDED / "tiny_llama",
    "falcon with biases": {
        "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, **SMALL,
        "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False,
    },
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **LLAMA},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **LLAMA},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, **LLAMA},
}  # fmt: skip


def filled(source: Path | dict[str, Any], model: nn.Module) -> nn.Module:
    """The model with the weights of its folder, or with random weights and biases large enough to notice if a bias is
    added twice."""
    if isinstance(source, Path):
        load_weights(model, Checkpoint.open(source), "cpu")
        return model
    fill_random(model, 0, "cpu")
    for name, parameter in stored_tensors(model):
        (start, *_), local = local_block(parameter)
        if parameter.dim() > 1:
            parameter.mul_(5)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * torch.arange(start, start + len(local)).sin())
    return model


def answered(source: Path | dict[str, Any], rank: int, size: int, ways: Collectives) -> dict[str, Any]:
    model = build_meta(source, torch.float32)
    keep_kv_heads_only(model)
    tensor_parallel_model(model, rank, size, ways)
    if size > 1:
        fuse_projections(model, 0)
    filled(source, model)
    if size > 1:
        assert pack_weights(model) > 0
    decoder = Decoder(model, (), torch.device("cpu"), seed=0)
    made = decoder.generate(PROMPTS, SamplingConfig(max_new_tokens=12, ignore_eos=True), lambda _: None)
    return {
        "tokens": [item.token_ids for item in made.completions],
        "gaps": [gap for item in made.completions for gap in item.top2_gaps],
        "parameter_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "vector_bytes": sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 1),
        "cache_bytes": sum(decoder.kv_cache_bytes.values()),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
    }


def main() -> None:
    products.LEAST_VALUES[torch.float32] = 1  # pack weights even of these small matrices, for which it does not pay
    world = World.from_env(os.environ)
    connect(world, torch.device("cpu"))
    ways = collectives(world, torch.device("cpu"))
    print(ways.way)
    found = {
        name: {"whole": answered(source, 0, 1, ways), "cut": answered(source, world.rank, world.world_size, ways)}
        for name, source in MODELS.items()
    }
    (Path(sys.argv[1]) / f"rank_{world.rank}.json").write_text(json.dumps(found))
    disconnect()


if __name__ == "__main__":
    main()
