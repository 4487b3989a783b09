"""An engine without weights: it completes every prompt by counting upwards from its last token."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.base import LENGTH, Completion, DeviceMemory, Generation
from launcher.config.options import NOT_NEGATIVE, SECONDS, choice, number
from launcher.config.schema import BackendConfig, ConfigError
from shards.engines.dummy import DummyPlanner
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import OnStep, Prompt
    from launcher.config.schema import RunConfig, SamplingConfig
    from shards.machine.world import World
    from shards.model.config_fields import TransformersConfig
    from shards.plan.plan import Plan

VOCAB_SIZE = 256  # ids stay within any real vocabulary


@dataclass
class DummyConfig(BackendConfig):
    """An engine to try configurations, launchers and reports with."""

    implementation: ClassVar[str] = "launcher.backends.dummy:DummyBackend"
    planner_class: ClassVar[type[EnginePlanner] | None] = DummyPlanner
    data_parallel: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False

    name: str = "dummy"
    step_s: float = number(0.0, SECONDS)  # seconds per decode step
    fail_at: str = choice("", "load", "generate", "hang")  # where the last rank fails; hang: generate never returns
    fail_after: int = number(0, NOT_NEGATIVE)  # successful calls of generate before the failure
    memory_batch: int | None = number(None, NOT_NEGATIVE)  # prompts of the largest batch that fits

    def refuse(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool, longest: int) -> None:
        if self.fail_after and not self.fail_at:
            fact = f"backend.fail_after={self.fail_after} is only used with backend.fail_at=."
            raise ConfigError(fact, "backend.fail_at=generate")


class OutOfMemoryError(RuntimeError):
    """A stand-in for torch's error, with the same name and message."""


class DummyBackend:
    """A deterministic engine without dependencies. Each step takes `step_s`; it fails at the stage `fail_at`."""

    def __init__(self, config: RunConfig) -> None:
        self.options: DummyConfig = config.backend  # type: ignore[assignment]
        self.world: World | None = None
        self.calls = 0

    def load(self, plan: Plan | None, world: World, progress: Callable[[int, int], None]) -> None:
        self.world = world
        progress(1, 1)
        self._maybe_fail("load")

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        capacity = self.options.memory_batch
        if capacity is not None and len(prompts) > capacity:  # the error claims 1 MiB per prompt
            raise OutOfMemoryError(
                f"dummy out of memory. Tried to allocate {len(prompts)}.00 MiB. GPU 0 has a total capacity of "
                f"{capacity}.00 MiB of which {capacity}.00 MiB is free."
            )
        if self.calls >= self.options.fail_after:
            self._maybe_fail("generate")
            self._maybe_hang()
        self.calls += 1
        start = time.perf_counter()
        marks = []
        for _ in range(sampling.max_new_tokens):
            time.sleep(self.options.step_s)
            marks.append(time.perf_counter() - start)
            on_step(len(prompts))
        gaps = tuple(later - earlier for earlier, later in itertools.pairwise(marks))
        completions = []
        for prompt in prompts:  # each answer counts up from the last token of its prompt
            tokens = [(prompt.token_ids[-1] + step) % VOCAB_SIZE for step in range(1, sampling.max_new_tokens + 1)]
            completions.append(Completion(prompt.index, tuple(tokens), LENGTH, marks[0], gaps))
        return Generation(tuple(completions), prefill_s=marks[0], decode_s=marks[-1] - marks[0])

    def barrier(self) -> None:
        """Does nothing: the ranks of a dummy never wait for each other."""

    def memory(self) -> list[DeviceMemory]:
        assert self.world is not None
        names = [
            field.name for field in fields(DeviceMemory) if field.name.endswith("_bytes") or field.name == "phases"
        ]
        reasons = dict.fromkeys(names, "the dummy engine holds nothing")
        del reasons["parameter_bytes"]
        return [DeviceMemory(self.world.rank, "none", parameter_bytes=0, reasons=reasons)]

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

    @property
    def _is_last(self) -> bool:
        assert self.world is not None
        return self.world.rank == self.world.world_size - 1

    def _maybe_fail(self, stage: str) -> None:
        if self.options.fail_at == stage and self._is_last:
            raise RuntimeError(f"the dummy engine was told to fail at {stage}")

    def _maybe_hang(self) -> None:
        while self.options.fail_at == "hang" and self._is_last:
            time.sleep(60)
