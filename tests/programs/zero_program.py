"""A rank of ZeRO-Inference: `zero_program.py OUT MODEL:OFFLOAD...`.

For each model: its greedy tokens, those of the reference, and the planned and held bytes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rank_program import configured

from launcher.backends.base import Prompt
from launcher.config.engines import resolve
from launcher.config.parts.storage import Offload
from launcher.config.schema import RunConfig, SamplingConfig
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from shards.checkpoint.checkpoint import Checkpoint
from shards.machine.world import World
from shards.plan.plan import Plan

PROMPTS = [Prompt(index, "", tuple(range(5, 9 + 3 * index))) for index in range(5)]


def planned(config: RunConfig) -> Plan:
    folder = EMBEDDED / config.model.name
    fields = json.loads((folder / "config.json").read_text())
    plan = plan_of(config, fields, Checkpoint.open(folder).tensors, PROMPTS, on_cuda=False)
    assert plan is not None
    return plan


def answered(config: RunConfig, plan: Plan, world: World) -> tuple[dict[int, tuple[int, ...]], Any]:
    """Tokens by prompt, and the engine."""
    backend = resolve(config.backend.implementation)(config)
    backend.load(plan, world, lambda done, total: None)
    made = backend.generate(PROMPTS, SamplingConfig(max_new_tokens=8), lambda tokens, finished=(): None)
    return {item.index: item.token_ids for item in made.completions}, backend


def main() -> None:
    world, results = World.from_env(os.environ), {}
    os.environ.update(world.environ())
    for asked in sys.argv[2:]:
        model, _, offload = asked.partition(":")
        alone = configured("transformers", model, 1)
        reference, _ = answered(alone, planned(alone), World())
        config = configured("deepspeed", model, world.world_size)
        config.backend.zero = True  # type: ignore[attr-defined]
        plan = planned(config)
        config.offload = Offload[offload]  # set after the plan: the launcher refuses it on a CPU, DeepSpeed supports it
        made, backend = answered(config, plan, world)
        [memory] = backend.memory()
        results[asked] = {
            "tokens": made,
            "reference": reference,
            "planned": plan.devices[world.rank].parameter_bytes,
            "held": memory.parameter_bytes,
        }
    (Path(sys.argv[1]) / f"rank_{world.rank}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
