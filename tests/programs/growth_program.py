"""`growth_program.py OUT RANKS STEPS`: memory and cache of an fsdp rank after each of ten calls of STEPS steps."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

from rank_program import configured, loaded

from launcher.backends.base import Prompt
from launcher.backends.memory import host_anonymous_bytes
from launcher.config.schema import SamplingConfig
from shards.machine.world import World
from shards.parallel.fully_shard import bookkeeping_entries


def main() -> None:
    out, ranks = Path(sys.argv[1]), sys.argv[2]
    world = World.from_env(os.environ)
    prompts = [Prompt(index, "", (1, 2, 3)) for index in range(int(ranks))]
    steps = SamplingConfig(max_new_tokens=int(sys.argv[3]), ignore_eos=True)
    backend, _ = loaded(configured("fsdp", "tiny_draft", int(ranks)), world, prompts)
    host, cache = [], []
    for _ in range(10):
        backend.generate(prompts, steps, lambda tokens, finished=(): None)
        assert bookkeeping_entries(backend.model) == 0
        ctypes.CDLL(None).malloc_trim(0)  # return free heap memory to the system, so that only used memory is measured
        host.append(host_anonymous_bytes())
        cache.append(backend.memory()[0].kv_cache_bytes)
    (out / f"rank_{world.rank}.json").write_text(json.dumps({"host": host, "cache": cache}))
    backend.close()
    os._exit(0)


if __name__ == "__main__":
    main()
