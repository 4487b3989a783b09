"""`endpoint_growth_program.py URL`: prints a client's memory after each 1,000 of 10,000 requests, 64 open at once."""

from __future__ import annotations

import ctypes
import json
import sys

import psutil

from launcher.backends.endpoint.backend import EndpointBackend
from launcher.composition.compose import compose_run
from launcher.prompts.prompts import sampling_of, synthetic_prompts
from shards.machine.world import World

VOCAB_SIZE = 256  # of the fake server, whose answers count upwards from the last token


def main() -> None:
    sizes = ("prompts.count=1000", "prompts.input_tokens=4", "prompts.output_tokens=4", "load.concurrency=64")
    config = compose_run(["backend=endpoint", f"backend.url={sys.argv[1]}", "prompts=synthetic", *sizes])
    backend = EndpointBackend(config)
    backend.load(None, World(), lambda done, total: None)
    prompts = synthetic_prompts(1000, 4, VOCAB_SIZE, seed=0)
    right = [tuple((prompt.token_ids[-1] + step) % VOCAB_SIZE for step in range(1, 5)) for prompt in prompts]
    held = []
    for _ in range(10):
        generation = backend.generate(prompts, sampling_of(config), lambda tokens, finished=(): None)
        assert [completion.token_ids for completion in generation.completions] == right
        assert generation.failures == ()
        del generation
        ctypes.CDLL(None).malloc_trim(0)  # return free heap memory to the system, so that only used memory is measured
        held.append(psutil.Process().memory_full_info().uss)
    backend.close()
    print(json.dumps(held))


if __name__ == "__main__":
    main()
