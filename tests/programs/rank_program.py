"""Runs an engine for test_contract.py, as one rank: `rank_program.py BACKEND MODEL OUT DEVICES [SCENARIO...]`.

Writes the results of the named scenarios, by default all, to OUT/rank_N.json, for the tests to compare.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.backends.base import Backend, Completion, Generation, Prompt
from launcher.backends.drafts import make_guesser
from launcher.composition.compose import compose_run
from launcher.config.engines import resolve
from launcher.config.parts.speculative import SpeculativeConfig
from launcher.config.schema import RunConfig, SamplingConfig
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from launcher.prompts.batches import batches, call_count, split
from launcher.prompts.prompts import encode
from shards.checkpoint.checkpoint import Checkpoint
from shards.machine.world import World

PROMPTS = Path(__file__).parents[1] / "ragged_prompts.txt"
ENDED = "The capital of France is Paris, a city on the river Seine."  # the tiny models answer it with EOS at once
GREEDY = SamplingConfig(max_new_tokens=24)
SCENARIOS = {
    "greedy": GREEDY,
    "ignore_eos": replace(GREEDY, ignore_eos=True),
    "sampled": replace(GREEDY, temperature=0.8, top_p=0.95, top_k=50),
    "sampled again": replace(GREEDY, temperature=0.8, top_p=0.95, top_k=50),
}
UNLIKE = SamplingConfig(max_new_tokens=40)
UNLIKE_SLOTS = 8  # slots of all ranks together


def unlike_texts() -> list[str]:
    """64 prompts for UNLIKE; the answers of tiny_llama to them have 3 to 40 tokens."""
    draw, words = random.Random(10), PROMPTS.read_text().split()
    return [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(64)]


def answer(
    backend: Backend, config: RunConfig, world: World, prompts: list[Prompt], sampling: SamplingConfig
) -> list[Completion]:
    """This rank's completions of a prompt set, in the batches of the real loop."""
    own = split(prompts, world, config)
    size, calls = call_count(len(prompts), world, config)
    made = [backend.generate(batch, sampling, lambda tokens, finished=(): None) for batch in batches(own, size, calls)]
    return [completion for generation in made for completion in generation.completions]


def configured(name: str, model: str, devices: int) -> RunConfig:
    """The configuration of one engine on the CPU."""
    config = compose_run([f"backend={name}", f"model={model}", f"devices={devices}", "accelerator=cpu"])
    config.model.path = str(EMBEDDED / model)
    return config


def loaded(config: RunConfig, world: World, prompts: list[Prompt]) -> tuple[Backend, list[tuple[int, int]]]:
    """The engine with its weights on this rank, and the progress that it reported while loading."""
    os.environ.update(world.environ())
    folder = Path(config.model.path)
    tensors = Checkpoint.open(folder).tensors
    plan = plan_of(config, json.loads((folder / "config.json").read_text()), tensors, prompts, on_cuda=False)
    seen: list[tuple[int, int]] = []
    backend: Backend = resolve(config.backend.implementation)(config)
    backend.load(plan, world, lambda done, total: seen.append((done, total)))
    return backend, seen


def unlike(backend: Any, config: RunConfig, world: World, prompts: list[Prompt]) -> Generation:
    """This rank's answers to `unlike_texts`; a loaded backend with slots is changed to UNLIKE_SLOTS slots."""
    if config.backend.has_slots:
        apart = world.world_size if config.backend.data_parallel else 1
        backend.decoder.num_slots, backend.decoder.slots = UNLIKE_SLOTS // apart, None
    generation: Generation = backend.generate(split(prompts, world, config), UNLIKE, lambda tokens, finished=(): None)
    return generation


def guessed(backend: Any, config: RunConfig, world: World, prompts: list[Prompt]) -> dict[str, list[Completion]]:
    """This rank's completions with each kind of speculative decoding, which is added to a backend loaded without it."""
    found = {}
    for wanted in (
        SpeculativeConfig("ngram", 4, 3, 1),
        SpeculativeConfig("draft", 4, model=str(EMBEDDED / "tiny_draft")),
    ):
        decoder = backend.decoder
        decoder.guesser, decoder.ahead = make_guesser(wanted, backend.dtype, backend.device, backend.pack), 4
        decoder.slots = None
        for scenario in ("greedy", "ignore_eos", "sampled"):
            found[f"{wanted.name} {scenario}"] = answer(backend, config, world, prompts, SCENARIOS[scenario])
    return found


def main() -> None:
    name, model, out, devices = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    world = World.from_env(os.environ)
    config = configured(name, model, devices)
    prompts = encode(PROMPTS.read_text().splitlines(), EMBEDDED / model)
    ended = encode([ENDED], EMBEDDED / model)
    asked = {scenario: (prompts, sampling) for scenario, sampling in SCENARIOS.items()}
    asked |= {"one prompt": (prompts[:1], GREEDY), "ended prompt": (ended, GREEDY)}
    named = sys.argv[5:] or [*asked, "unlike", "guesses"]
    backend, seen = loaded(config, world, prompts)
    result = {key: answer(backend, config, world, *asked[key]) for key in asked if key in named}
    backend.barrier()
    memory = [asdict(device) for device in backend.memory()]
    counters: dict[str, float] = {}
    if model == "tiny_llama" and "unlike" in named:
        generation = unlike(backend, config, world, encode(unlike_texts(), EMBEDDED / model))
        result["unlike"], counters = list(generation.completions), generation.counters
    if config.backend.has_slots and "guesses" in named:
        result |= guessed(backend, config, world, prompts)
    backend.close()
    value = {
        "progress": seen[-1:],
        "completions": {key: [asdict(item) for item in value] for key, value in result.items()},
        "memory": memory,
        "counters": counters,
    }
    (out / f"rank_{world.rank}.json").write_text(json.dumps(value))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
