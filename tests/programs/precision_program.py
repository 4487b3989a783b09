"""Mixed precision on one or several ranks: `precision_program.py BACKEND DEVICES OUT`.

For each model and dtype: the logits of a text, and the bytes held and gathered, each with the planned bytes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rank_program import GREEDY, configured
from torch.distributed.fsdp import FSDPModule

from launcher.backends.base import Prompt
from launcher.config.engines import resolve
from launcher.config.parts.storage import Precision
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from shards.checkpoint.checkpoint import Checkpoint
from shards.machine.world import World
from shards.parallel.fully_shard import _groups, decoder_layers

IDS = (5, 77, 301, 12, 9, 44, 130, 8)
PROMPTS = [Prompt(index, "", IDS[: 8 - index]) for index in range(4)]


def gathered_bytes(model: torch.nn.Module) -> int:
    """Bytes of the decoder layers that one forward pass gathers."""
    layers = [layer for layer in decoder_layers(model) if isinstance(layer, FSDPModule)]
    if getattr(model, "shared_layers", None) is not None:
        return sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    parameters = [parameter for layer in layers for group in _groups(layer) for parameter in group.fsdp_params]
    return sum(output.nbytes for parameter in parameters for output in parameter.all_gather_outputs)


def seen(backend_name: str, devices: int, model: str, precision: Precision, world: World) -> dict[str, Any]:
    config = configured(backend_name, model, devices)
    config.precision = precision
    folder = EMBEDDED / model
    plan = plan_of(
        config,
        json.loads((folder / "config.json").read_text()),
        Checkpoint.open(folder).tensors,
        PROMPTS,
        on_cuda=False,
    )
    assert plan is not None
    backend = resolve(config.backend.implementation)(config)
    backend.load(plan, world, lambda done, total: None)
    backend.generate(PROMPTS, GREEDY, lambda tokens, finished=(): None)
    head = backend.model.get_output_embeddings()
    head.gathering = True  # makes a split head gather the logits of all ranks
    with torch.inference_mode(), backend.autocast():
        logits = backend.model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float()
    gathered = gathered_bytes(backend.model)
    [memory] = backend.memory()
    planned = plan.devices[world.rank]
    return {
        "logits": logits,
        "parameters": (memory.parameter_bytes, planned.parameter_bytes),
        "cache": (memory.kv_cache_bytes, planned.kv_cache_bytes),
        "gathered": (gathered, plan.roofline.work.gathered_bytes),
    }


def main() -> None:
    backend, devices, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    world = World.from_env(os.environ)
    os.environ.update(world.environ())
    result = {
        f"{model} {precision.name}": seen(backend, devices, model, precision, world)
        for model in ("tiny_falcon", "tiny_llama")
        for precision in (Precision.bf16_mixed, Precision.fp16_mixed)
    }
    torch.save(result, out / f"rank_{world.rank}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
