"""Speculative decoding against plain decoding, interleaved in one process: tokens/s and accepted tokens.

    python scripts/benchmarks/speculative.py [--target tiny_llama|wide] [--slots 1,4] [--tokens 4] [--repeats 5]

`wide` is tiny_llama padded to 1 GB: additional dimensions of its hidden states, heads and MLPs are computed, but do not
affect the output. It generates the tokens of tiny_llama, so tiny_draft can draft for it. On a busy machine one thread
(OMP_NUM_THREADS=1) is faster than two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ranks import alternating
from safetensors.torch import load_file, save_file

from launcher.backends.base import Generation, Prompt
from launcher.backends.drafts import make_guesser
from launcher.composition.compose import compose_run
from launcher.config.engines import resolve
from launcher.config.parts.speculative import DRAFT, NGRAM, NONE, SpeculativeConfig
from launcher.config.schema import SamplingConfig
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from launcher.prompts.prompts import encode
from launcher.report.layout import console
from launcher.results.figures.metrics import ROWS
from launcher.results.figures.speculation import ACCEPTED, GUESSED, GUESSING
from shards.checkpoint.checkpoint import Checkpoint
from shards.machine.world import World

if TYPE_CHECKING:
    from shards.untrusted_files import JsonObject

SMALL = EMBEDDED / "tiny_llama"
PROMPTS = Path(__file__).parents[2] / "tests" / "ragged_prompts.txt"
HIDDEN, INNER, TIMES = 2048, 7424, 16  # wide model: hidden size, MLP size, and its hidden size over tiny_llama's
KINDS = (NONE, NGRAM, DRAFT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("tiny_llama", "wide"), default="tiny_llama")
    parser.add_argument("--slots", type=lambda text: tuple(map(int, text.split(","))), default=(1, 4))
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = SMALL
        if options.target == "wide":
            folder = widen(Path(scratch))
        prompts = encode(PROMPTS.read_text().splitlines()[: options.prompts], SMALL)
        backend = loaded(folder, prompts)
        for slots in options.slots:
            measure(backend, prompts, slots, options)


def loaded(folder: Path, prompts: list[Prompt]) -> Any:
    """The reference engine with the weights of a folder, in this process."""
    config = compose_run(["backend=transformers", "model=tiny_llama", "devices=1", "accelerator=cpu"])
    config.model.path = str(folder)
    fields = json.loads((folder / "config.json").read_text())
    plan = plan_of(config, fields, Checkpoint.open(folder).tensors, prompts, on_cuda=False)
    backend = resolve(config.backend.implementation)(config)
    backend.load(plan, World.from_env(os.environ), lambda done, total: None)
    return backend


def measure(backend: Any, prompts: list[Prompt], slots: int, options: argparse.Namespace) -> None:
    """Answer all prompts with each kind of speculation in turns, and print the results."""
    wanted = {
        NONE: SpeculativeConfig(),
        NGRAM: SpeculativeConfig(NGRAM, options.tokens, 3, 1),
        DRAFT: SpeculativeConfig(DRAFT, options.tokens, model=str(EMBEDDED / "tiny_draft")),
    }
    guessers = {kind: make_guesser(one, backend.dtype, backend.device, backend.pack) for kind, one in wanted.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    answers: dict[str, Generation] = {}
    sampling = SamplingConfig(max_new_tokens=64)
    for turn in range(options.repeats + 1):
        for kind in alternating(KINDS, turn):
            decoder = backend.decoder
            decoder.guesser, decoder.ahead = guessers[kind], wanted[kind].most
            decoder.slots, decoder.num_slots = None, slots
            start = time.perf_counter()
            answers[kind] = backend.generate(prompts, sampling, lambda tokens, finished=(): None)
            if turn:  # the first turn warms up
                taken[kind].append(time.perf_counter() - start)
    report(answers, taken, slots, options.target)


def report(answers: dict[str, Generation], taken: dict[str, list[float]], slots: int, target: str) -> None:
    """Print a line for each kind of speculation; ratios compare calls of the same turn."""
    out = console()
    for kind in KINDS:
        generation = answers[kind]
        assert [c.token_ids for c in generation.completions] == [c.token_ids for c in answers[NONE].completions]
        new = sum(completion.new_tokens for completion in generation.completions)
        ratios = [plain / guessed for plain, guessed in zip(taken[NONE], taken[kind], strict=True)]
        result: JsonObject = {
            "target": target, "slots": slots, "guesses": kind,
            "tokens_per_s": round(new / statistics.median(taken[kind]), 1),
            "ratio": round(statistics.median(ratios), 3), "ratios": [round(ratio, 2) for ratio in ratios],
            "tokens_per_step": round((new - len(generation.completions)) / generation.counters[ROWS], 2),
        }  # fmt: skip
        if kind != NONE:
            result["accepted"] = round(generation.counters[ACCEPTED] / max(generation.counters[GUESSED], 1), 3)
            result["guessing_share"] = round(generation.counters[GUESSING] / (generation.decode_s or 1), 3)
        out.print_json(json.dumps(result), indent=None)


def widen(folder: Path) -> Path:
    """Write tiny_llama, padded to about 1 GB with parameters that do not change its output; returns the folder."""
    config = json.loads((SMALL / "config.json").read_text())
    small = {name: tensor for path in SMALL.glob("*.safetensors") for name, tensor in load_file(path).items()}
    head_dim, hidden = config["head_dim"], config["hidden_size"]
    assert hidden * TIMES == HIDDEN
    generator = torch.Generator().manual_seed(0)
    wide = {name: widened(name, tensor.float(), generator) for name, tensor in small.items()}
    save_file(wide, folder / "model.safetensors")
    # RMSNorm: padding divides the mean square by TIMES, so eps is divided by it too and the weights by its square root,
    # here 4: a power of two, which is exact.
    changed = {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HIDDEN // head_dim,
        "num_key_value_heads": HIDDEN // head_dim, "rms_norm_eps": config["rms_norm_eps"] / TIMES, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def widened(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A larger parameter with `tensor` in its corner. The padding is random if its results are unused, else zero."""
    if name.endswith("norm.weight"):
        larger = torch.zeros(HIDDEN)
        larger[: len(tensor)] = tensor / TIMES**0.5
        return larger
    kind = name.split(".")[-2]
    inputs = {"down_proj": INNER}.get(kind, HIDDEN)
    outputs = {"gate_proj": INNER, "up_proj": INNER, "lm_head": len(tensor), "embed_tokens": len(tensor)}
    rows = outputs.get(kind, HIDDEN)
    larger = torch.zeros(rows, inputs)
    if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):  # o_proj and down_proj ignore the extra outputs
        larger[len(tensor) :].normal_(std=0.02, generator=generator)
    larger[: tensor.shape[0], : tensor.shape[1]] = tensor
    return larger


if __name__ == "__main__":
    main()
