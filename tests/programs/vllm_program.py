"""`vllm_program.py DEVICES OUT [kill]`: runs the vllm backend, alone or as a rank under torchrun.

Writes its observations to OUT/rank_N.json. With `kill` it kills one of its workers in the middle of a call.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from launcher.backends.base import Generation, Prompt
from launcher.backends.vllm.backend import VllmBackend
from launcher.composition.compose import compose_run
from launcher.config.parts.serving import LoadConfig
from launcher.config.schema import ConfigError, RunConfig, SamplingConfig
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from launcher.prompts.prompts import encode
from shards.machine.world import World
from shards.plan.plan import Plan

PROMPTS = Path(__file__).parents[1] / "ragged_prompts.txt"
FOLDER = EMBEDDED / "tiny_falcon"
POOL_BYTES = 50_000_000  # not a whole number of blocks
FULL = SamplingConfig(max_new_tokens=40, ignore_eos=True)


def configured(devices: int, **extra: Any) -> RunConfig:
    config = compose_run(["backend=vllm", "model=tiny_falcon", f"devices={devices}", "accelerator=cpu"])
    config.model.path = str(FOLDER)
    config.backend.extra = {"block_size": 32, **extra}  # type: ignore[attr-defined]
    return config


def planned(config: RunConfig, prompts: list[Prompt]) -> Plan:
    """The plan of a run; for several devices, with a KV cache of POOL_BYTES."""
    plan = plan_of(config, json.loads((FOLDER / "config.json").read_text()), None, prompts, on_cuda=False)
    return replace(plan, kv_cache_memory_bytes=POOL_BYTES) if config.devices > 1 else plan


def refusal(config: RunConfig, world: World, prompts: list[Prompt]) -> str:
    """The error message with which the engine refuses a configuration; empty if it does not."""
    try:
        VllmBackend(config).load(planned(config, prompts), world, lambda done, total: None)
    except ConfigError as error:
        return str(error)
    return ""


def timed(backend: VllmBackend, prompts: list[Prompt]) -> dict[str, Any]:
    """One call: its wall-clock time, the new tokens of each step, and its completions."""
    steps: list[int] = []
    start = time.perf_counter()
    generation: Generation = backend.generate(prompts, FULL, lambda tokens, finished=(): steps.append(tokens))
    wall_s = time.perf_counter() - start
    return {"wall_s": wall_s, "steps": steps, "completions": [asdict(item) for item in generation.completions]}


def paced(backend: VllmBackend, prompts: list[Prompt]) -> dict[str, Any]:
    """Calls whose prompts do not all arrive at once."""
    calls = {}
    for name, load in {"three": LoadConfig(concurrency=3), "poisson": LoadConfig(request_rate=100.0)}.items():
        backend.config.load = load
        calls[name] = timed(backend, prompts)
    backend.config.load = LoadConfig()
    return calls


def too_long(backend: VllmBackend) -> str:
    try:
        backend.generate([Prompt(0, "", (5,) * 1000)], FULL, lambda tokens, finished=(): None)
    except ConfigError as error:
        return str(error)
    return ""


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "Worker" in " ".join(child.cmdline())]


def killed(backend: VllmBackend, prompts: list[Prompt]) -> dict[str, Any]:
    """The error of a call whose worker is killed, and the seconds from the kill to the error."""
    at = 0.0

    def kill() -> None:
        nonlocal at
        at = time.perf_counter()
        workers()[1].kill()

    long = SamplingConfig(max_new_tokens=900, ignore_eos=True)
    threading.Timer(0.5, kill).start()
    try:
        for _ in range(1000):
            backend.generate(prompts, long, lambda tokens, finished=(): None)
    except RuntimeError as error:
        return {"message": str(error), "after_s": time.perf_counter() - at}
    return {}


def main() -> None:
    devices, out = int(sys.argv[1]), Path(sys.argv[2])
    world = World.from_env(os.environ)
    os.environ.update(world.environ())
    prompts = encode(PROMPTS.read_text().splitlines(), FOLDER)
    result: dict[str, Any] = {"refused": refusal(configured(devices, max_num_seq=2), world, prompts)}
    result["ours"] = refusal(configured(devices, dtype="float16"), world, prompts)

    config = configured(devices)
    backend = VllmBackend(config)
    backend.load(planned(config, prompts), world, lambda done, total: result.update(progress=[done, total]))
    result["threads"] = [int(worker.environ()["OMP_NUM_THREADS"]) for worker in workers()]
    backend.barrier()
    result["calls"] = [timed(backend, prompts[::-1]), timed(backend, prompts)]
    result["empty"] = asdict(backend.generate([], FULL, lambda tokens, finished=(): None))
    result["paced"] = paced(backend, prompts) if devices == 1 else {}
    result["too_long"] = too_long(backend)
    result["memory"] = [asdict(device) for device in backend.memory()]
    if "kill" in sys.argv:
        result["killed"] = killed(backend, prompts)
    backend.close()
    (out / f"rank_{world.rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
