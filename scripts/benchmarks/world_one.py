"""backend=fsdp on one device against backend=transformers, interleaved in one process: the ratio should be 1.

python scripts/benchmarks/world_one.py [--model tiny_falcon] [--pairs 15] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

from ranks import alternating

from launcher.backends.base import Prompt
from launcher.composition.compose import compose_run
from launcher.config.engines import resolve
from launcher.config.schema import SamplingConfig
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from launcher.prompts.prompts import synthetic_prompts
from launcher.report.layout import console
from shards.checkpoint.checkpoint import Checkpoint
from shards.machine.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_falcon")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    prompts = synthetic_prompts(4, 32, 256, seed=0)
    sampling = SamplingConfig(max_new_tokens=options.new_tokens, ignore_eos=True)
    fsdp, plain = (loaded(name, options.model, prompts) for name in ("fsdp", "transformers"))
    ratios = []
    out = console()
    for pair in range(options.pairs + 1):
        taken = {id(engine): timed(engine, prompts, sampling) for engine in alternating((fsdp, plain), pair)}
        ratio = taken[id(plain)] / taken[id(fsdp)]
        if pair:  # the first pair warms up
            ratios.append(ratio)
            out.print(f"fsdp {taken[id(fsdp)]:.4f} s  transformers {taken[id(plain)]:.4f} s  speed ratio {ratio:.3f}")
    result = {"model": options.model, "median_ratio": statistics.median(ratios), "ratios": ratios}
    print(json.dumps(result))


def loaded(name: str, model: str, prompts: list[Prompt]):
    """The engine with its weights loaded, in this process."""
    config = compose_run([f"backend={name}", f"model={model}", "devices=1", "accelerator=cpu"])
    config.model.path = str(EMBEDDED / model)
    shape = json.loads((EMBEDDED / model / "config.json").read_text())
    plan = plan_of(config, shape, Checkpoint.open(EMBEDDED / model).tensors, prompts, on_cuda=False)
    engine = resolve(config.backend.implementation)(config)
    engine.load(plan, World.from_env(os.environ), lambda done, total: None)
    return engine


def timed(engine, prompts: list[Prompt], sampling: SamplingConfig) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    engine.generate(prompts, sampling, lambda tokens, finished=(): None)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
