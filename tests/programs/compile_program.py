"""`compile_program.py BACKEND RANKS OUT`: the tokens of a small model before and after its steps are compiled."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from rank_program import configured, loaded
from torch._dynamo.utils import counters

from launcher.backends.base import Prompt
from launcher.config.parts.compiling import Compile
from launcher.config.schema import SamplingConfig
from shards.machine.world import World

PROMPTS = [Prompt(index, "", tuple(range(5 + index, 5 + length))) for index, length in enumerate((3, 9, 4, 12, 7))]
SAMPLING = SamplingConfig(max_new_tokens=6, ignore_eos=True)


def main() -> None:
    name, ranks, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    world = World.from_env(os.environ)
    config = configured(name, "tiny_draft", ranks)
    config.measure.batch_size = 2
    config.sampling = SAMPLING
    config.measure.compile = Compile.inductor
    backend, _ = loaded(config, world, PROMPTS)

    def answers() -> list[tuple[int, tuple[int, ...]]]:
        made = backend.generate(PROMPTS, SAMPLING, lambda *_: None).completions
        return [(item.index, item.token_ids) for item in made]

    eager = answers()
    compilation = backend.compile(PROMPTS[:2], SAMPLING, lambda *_: None)
    graphs = counters["stats"]["unique_graphs"]
    compiled = answers()
    value = {
        "compilation": asdict(compilation), "eager": eager, "compiled": compiled, "graphs": graphs,
        "graphs in a measure": counters["stats"]["unique_graphs"] - graphs,
    }  # fmt: skip
    backend.barrier()
    (out / f"rank_{world.rank}.json").write_text(json.dumps(value))
    backend.close()
    os._exit(0)


if __name__ == "__main__":
    main()
