"""How much the vllm backend adds to vLLM: tokens/s of `backend.generate` over those of a bare `LLM.generate`.

    python scripts/benchmark_vllm.py [--model tiny_falcon] [--devices 1] [--prompts 64] [--new-tokens 64] [--pairs 15]

Both answer the same requests on the same engine in turns, so that what disturbs one disturbs the other; for the bare
calls what the backend put into the engine is taken out. `--model` may be a folder. Prints each pair and the median of
the ratios; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launcher.backends.vllm.backend import VllmBackend  # noqa: E402
from launcher.composition.compose import compose_run  # noqa: E402
from launcher.config.schema import SamplingConfig  # noqa: E402
from launcher.models import EMBEDDED  # noqa: E402
from launcher.prepare.planning import plan_of  # noqa: E402
from launcher.prompts.prompts import synthetic_prompts  # noqa: E402
from shards.machine.cards import cuda_devices  # noqa: E402
from shards.machine.world import World  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.base import Prompt


def main() -> None:
    options = parse()
    folder = Path(options.model) if Path(options.model).is_dir() else EMBEDDED / options.model
    shape = json.loads((folder / "config.json").read_text())
    prompts = synthetic_prompts(options.prompts, options.prompt_tokens, shape["vocab_size"], seed=0)
    backend = loaded(folder, options, shape, prompts)
    tokens = options.prompts * options.new_tokens
    print(f"{'pair':>4} {'backend tokens/s':>18} {'bare tokens/s':>18} {'ratio':>7}")
    pairs = []
    for number in range(options.pairs + 1):
        ours, bare = measure(backend, prompts, options.new_tokens, ours_first=number % 2 == 0)
        if number:  # the first pair warms up
            pairs.append({"backend_s": ours, "bare_s": bare, "ratio": bare / ours})
            print(f"{number:4} {tokens / ours:18.1f} {tokens / bare:18.1f} {bare / ours:7.4f}", flush=True)
    backend.close()
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    print(f"median ratio {ratio:.4f}")
    print(json.dumps({"median_ratio": ratio, "options": vars(options), "pairs": pairs}), flush=True)
    os._exit(0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_falcon")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    return parser.parse_args()


def loaded(folder: Path, options: argparse.Namespace, shape: dict[str, Any], prompts: list[Prompt]) -> VllmBackend:
    place = f"accelerator={'cuda' if cuda_devices(os.environ) else 'cpu'}"
    config = compose_run(["backend=vllm", place, f"devices={options.devices}", f"precision={options.precision}"])
    config.model.path = str(folder)
    backend = VllmBackend(config)
    plan = plan_of(config, shape, None, prompts, on_cuda=not backend.on_cpu)
    backend.load(plan, World(), lambda done, total: None)
    return backend


def measure(backend: VllmBackend, prompts: list[Prompt], new_tokens: int, ours_first: bool) -> tuple[float, float]:
    """Seconds of one call of the backend and of one bare call; RuntimeError where their tokens differ."""
    taken, answers = {}, {}
    for ours in (ours_first, not ours_first):
        backend.llm.reset_prefix_cache()
        call = through_backend if ours else bare
        taken[ours], answers[ours] = call(backend, prompts, new_tokens)
    if answers[True] != answers[False]:
        raise RuntimeError("the backend and the bare engine gave different tokens")
    return taken[True], taken[False]


def through_backend(backend: VllmBackend, prompts: list[Prompt], new_tokens: int) -> tuple[float, list[list[int]]]:
    sampling = SamplingConfig(max_new_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    made = backend.generate(prompts, sampling, lambda tokens, finished=(): None)
    return time.perf_counter() - start, [list(item.token_ids) for item in made.completions]


def bare(backend: VllmBackend, prompts: list[Prompt], new_tokens: int) -> tuple[float, list[list[int]]]:
    """As one would write it without the launcher."""
    with untouched(backend.llm.llm_engine):
        start = time.perf_counter()
        params = backend.vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        ids = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        made = backend.llm.generate(ids, params, use_tqdm=False)
        taken = time.perf_counter() - start
    return taken, [list(item.outputs[0].token_ids) for item in made]


@contextmanager
def untouched(engine: Any) -> Iterator[None]:
    """The engine without the methods that the backend replaced."""
    core = getattr(engine.engine_core, "engine_core", None)
    places = [(engine.engine_core, "get_output")] + ([(core.scheduler, "schedule")] if core else [])
    replaced = [(place, name, place.__dict__.pop(name)) for place, name in places]
    try:
        yield
    finally:
        for place, name, value in replaced:
            setattr(place, name, value)


if __name__ == "__main__":
    main()
