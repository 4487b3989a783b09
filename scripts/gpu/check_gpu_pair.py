"""A run of the launcher that alternates repeats of its engine with turns of transformers' own `generate`.

    check_gpu_pair.py OVERRIDES ...

does the same as `python -m launcher OVERRIDES ...` in a rank that another launcher has started, and writes its record
to the run directory. Before each repeat the first rank answers the same prompts with a plain model of the same weights.
It shares the engine's tensors if the engine holds the whole model on the same device, and otherwise makes its own.
plain.json, next to the record, has the seconds of each turn.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.__main__ import main as launch
from launcher.backends.base import CompilingBackend
from launcher.config.engines import load_engine, resolve
from launcher.prompts.prompts import sampling_of
from launcher.run_dir.run_dir import RunDir
from launcher.system.files import write_json
from shards.load.meta import build_meta
from shards.load.random_weights import fill_random

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import Compilation, Completion, DeviceMemory, Generation, OnStep, Prompt
    from launcher.config.schema import RunConfig, SamplingConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan

PLAIN = "plain.json"


class Plain:
    """transformers' model and the prompts of a run, which its `generate` answers as one left-padded batch."""

    def __init__(self, config: RunConfig, model: torch.nn.Module, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts, self.new_tokens = model, prompts, sampling_of(config).max_new_tokens
        self.seconds: list[float] = []
        self.tokens: dict[int, list[int]] = {}
        self.peak_allocated_bytes: int | None = None

    def turn(self) -> None:
        """Answer all prompts once and measure the time."""
        device = next(self.model.parameters()).device
        rows = [list(prompt.token_ids) for prompt in self.prompts]
        width = max(map(len, rows))
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default; the engines switch it off
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            began = time.perf_counter()
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            made = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )[:, width:].tolist()  # fmt: skip
            self.seconds.append(time.perf_counter() - began)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
            gc.collect()
            if device.type == "cuda":  # reset, so that the engine's own peak is measured next
                self.peak_allocated_bytes = torch.cuda.max_memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
        self.tokens = {prompt.index: row for prompt, row in zip(self.prompts, made, strict=True)}


def shared(plain: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Give `plain`, a model on meta, the tensors of `model`; False if a name, type, shape, dtype or layout differs."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names = [*plain.named_parameters(remove_duplicate=False), *plain.named_buffers(remove_duplicate=False)]
    for name, wanted in names:
        other = tensors.get(name)
        if other is None or type(other.data) is not type(wanted.data):  # such as a quantized weight of the engine
            return False
        if (other.shape, other.dtype, other.layout) != (wanted.shape, wanted.dtype, wanted.layout):
            return False
    for name, _ in names:
        path, _, last = name.rpartition(".")
        module = plain.get_submodule(path)
        kept = module._buffers
        if last in module._parameters:
            kept = module._parameters
        kept[last] = tensors[name]
    return True


class Beside:
    """Wraps the engine of a run. The plain model takes its turn in the barrier before each repeat."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.engine: Any = resolve(type(config.backend).engine_alone)(config)  # type: ignore[attr-defined]
        self.plain: Plain | None = None
        self.own_bytes = 0  # parameters of the plain model that are not shared with the engine
        self.failure: str | None = None
        self.completions: tuple[Completion, ...] = ()

    def load(self, plan: Plan | None, world: World, progress: Callable[[int, int], None]) -> None:
        self.engine.load(plan, world, progress)
        if world.rank == 0:
            self._tried(self._load_plain)
            self._tried(self._turn)  # warm-up, as the engine gets one too
            if self.plain:
                self.plain.seconds.clear()

    def _load_plain(self) -> None:
        model_config = self.config.model
        dtype = getattr(torch, self.config.precision.value)
        model = build_meta(model_config.config or model_config.path, dtype)
        engine = getattr(self.engine, "model", None)
        if engine is None or not shared(model, engine):
            fill_random(model, self.config.seed, torch.device(self.config.accelerator.value))
            self.own_bytes = sum(one.nbytes for one in model.parameters())
        assert self.config.run_dir is not None
        self.plain = Plain(self.config, model, RunDir(Path(self.config.run_dir)).read_prompts())

    def _turn(self) -> None:
        if self.plain:
            self.plain.turn()

    def _tried(self, part: Callable[[], None]) -> None:
        """Call `part`; if it runs out of memory, the run continues without the plain model."""
        try:
            part()
        except torch.OutOfMemoryError as error:
            self.failure, self.plain, self.own_bytes = str(error).splitlines()[0], None, 0
        if self.failure:
            gc.collect()
            torch.cuda.empty_cache()

    def compile(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Compilation | None:
        """Compile the engine's steps, as in any run."""
        if not isinstance(self.engine, CompilingBackend):
            return None
        return self.engine.compile(prompts, sampling, on_step)

    def barrier(self) -> None:
        self._tried(self._turn)
        self.engine.barrier()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        generation: Generation = self.engine.generate(prompts, sampling, on_step)
        self.completions = generation.completions
        return generation

    def memory(self) -> list[DeviceMemory]:
        devices: list[DeviceMemory] = self.engine.memory()
        return devices

    def close(self) -> None:
        if self.plain or self.failure:
            tokens, values = {}, {"seconds": [], "new_tokens": 0, "peak_allocated_bytes": None}
            if plain := self.plain:
                tokens = plain.tokens
                values = {
                    "seconds": plain.seconds, "new_tokens": plain.new_tokens * len(plain.prompts),
                    "peak_allocated_bytes": plain.peak_allocated_bytes,
                }  # fmt: skip
            answers = {item.index: list(item.token_ids) for item in self.completions}
            same = [index for index, answer in answers.items() if tokens.get(index) == answer]
            assert self.config.run_dir is not None
            write_json(Path(self.config.run_dir) / PLAIN, {
                **values,
                "weights_of_its_own_bytes": self.own_bytes,
                "prompts": len(answers),
                "prompts_with_the_same_tokens": len(same),
                "failure": self.failure,
            })  # fmt: skip
        self.plain = None
        self.engine.close()


def main(argv: list[str]) -> int:
    """Run the launcher with the engine wrapped in `Beside`; returns the exit code."""
    name = next(word.partition("=")[2] for word in argv if word.startswith("backend="))
    kind: Any = load_engine(name)
    kind.engine_alone, kind.implementation = kind.implementation, "check_gpu_pair:Beside"
    if "RANK" not in os.environ:  # not started by torchrun: a world of one rank
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    return launch(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
