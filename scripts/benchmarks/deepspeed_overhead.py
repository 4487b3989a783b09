"""The overhead of the deepspeed backend: tokens/s of `backend.generate` over those of the same loop by hand.

    python scripts/benchmarks/deepspeed_overhead.py [--pairs 9] [--hidden 768] [--layers 8] [--batch 4]
                                                   [--new-tokens 32]

Two ranks on this machine hold the same random Llama twice: as loaded by the backend, and as converted from a whole
model by `deepspeed.init_inference`. Both answer the same prompts alternately, so that disturbances affect both. Prints
each pair and the median of the ratios; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from ranks import alternating  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402

from launcher.backends.base import Prompt  # noqa: E402
from launcher.backends.deepspeed.backend import DeepSpeedBackend  # noqa: E402
from launcher.config.schema import (  # noqa: E402
    Accelerator,
    DeepSpeedConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    SamplingConfig,
    Weights,
)
from launcher.prepare.planning import plan_of  # noqa: E402
from shards.load.random_weights import fill_random  # noqa: E402
from shards.machine.process_group import barrier  # noqa: E402
from shards.machine.world import World  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCABULARY = 8192


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"pairs": 9, "hidden": 768, "layers": 8, "batch": 4, "new-tokens": 32, "ranks": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    asked = options()
    if "RANK" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}"]
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // asked.ranks)))
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    world = World.from_env(os.environ)
    config, prompts = run_config(asked, world), ragged_prompts(asked.batch)
    backend = DeepSpeedBackend(config)
    backend.load(plan_of(config, config.model.config or {}, None, prompts, False), world, lambda *_: None)
    module = by_init_inference(config, world)
    pairs = [measure(backend, module, prompts, config.sampling, number) for number in range(asked.pairs + 1)][1:]
    if world.rank == 0:
        report(pairs, asked)
    backend.close()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed leaves threads that can hang the interpreter's own exit


def run_config(asked: argparse.Namespace, world: World) -> RunConfig:
    """The configuration of a run of a Llama with random weights, which needs no files."""
    model = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": asked.hidden, "num_hidden_layers": asked.layers,
        "intermediate_size": 8 * asked.hidden // 3 // 64 * 64, "num_attention_heads": asked.hidden // 64,
        "num_key_value_heads": asked.hidden // 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    return RunConfig(
        backend=DeepSpeedConfig(),
        model=ModelConfig(name="random_llama", path="", weights=Weights.random, config=model),
        prompts=PromptsConfig(name="ragged"),
        devices=world.world_size,
        accelerator=Accelerator.cpu,
        sampling=SamplingConfig(max_new_tokens=asked.new_tokens, ignore_eos=True),
    )


def ragged_prompts(batch: int) -> list[Prompt]:
    """Prompts of 8, 13, 18, ... tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, VOCABULARY, (8 + 5 * index,), generator=generator).tolist() for index in range(batch)]
    return [Prompt(index, "", tuple(row)) for index, row in enumerate(rows)]


def by_init_inference(config: RunConfig, world: World) -> Any:
    """The same model by `deepspeed.init_inference`, as documented: whole on every rank, then split."""
    model_config = AutoConfig.for_model(**(config.model.config or {}))
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).eval()
    fill_random(model, config.seed, "cpu")
    parallel = {"tp_size": world.world_size}
    engine = deepspeed.init_inference(
        model, tensor_parallel=parallel, dtype=torch.float32, replace_with_kernel_inject=False
    )
    return engine.module


@torch.inference_mode()
def by_hand(module: Any, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
    """Greedy decoding of a left-padded batch, with only the operations that the tokens need."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    inputs = torch.tensor([[0] * (width - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts])
    offsets = torch.arange(width + new_tokens) - (width - lengths)[:, None]
    mask, positions = (offsets >= 0).long(), offsets.clamp(min=0)
    cache, chosen = DynamicCache(config=module.config), []
    for step in range(new_tokens):
        known = width + step
        new = slice(known - inputs.shape[1], known)
        output = module(
            input_ids=inputs, attention_mask=mask[:, :known], position_ids=positions[:, new], past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        inputs = output.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(inputs)
    rows: list[list[int]] = torch.cat(chosen, 1).tolist()
    return rows


def measure(
    backend: DeepSpeedBackend, module: Any, prompts: list[Prompt], sampling: SamplingConfig, number: int
) -> tuple[float, float]:
    """Seconds of the backend and of the loop by hand; their order alternates with `number`."""
    seconds, rows = {}, {}
    for name in alternating(("backend", "hand"), number):
        barrier()
        began = time.perf_counter()
        if name == "backend":
            completions = backend.generate(prompts, sampling, lambda _: None).completions
            rows[name] = [list(item.token_ids) for item in completions]
        else:
            rows[name] = by_hand(module, prompts, sampling.max_new_tokens)
        seconds[name] = time.perf_counter() - began
    if rows["backend"] != rows["hand"]:
        raise RuntimeError("the backend and the loop by hand gave different tokens")
    return seconds["backend"], seconds["hand"]


def report(pairs: list[tuple[float, float]], asked: argparse.Namespace) -> None:
    tokens = asked.batch * asked.new_tokens
    print("backend tokens/s   by hand tokens/s   ratio")
    for backend, hand in pairs:
        print(f"{tokens / backend:16.1f} {tokens / hand:18.1f} {hand / backend:7.3f}")
    ratios = [hand / backend for backend, hand in pairs]
    fastest = [min(seconds) for seconds in zip(*pairs, strict=True)]
    print(f"median of the ratios {statistics.median(ratios):.3f}, ratio of the fastest {fastest[1] / fastest[0]:.3f}")
    print(json.dumps({
        "ratio": round(statistics.median(ratios), 4), "least": round(min(ratios), 4), "most": round(max(ratios), 4),
        "fastest_ratio": round(fastest[1] / fastest[0], 4),
        "backend_tokens_per_s": round(tokens / statistics.median(pair[0] for pair in pairs), 1),
        "pairs": len(pairs), "world_size": asked.ranks,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
