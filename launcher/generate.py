"""The common loop: warm up, then answer the whole prompt set `repeats` times, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from launcher.prompts import sampling_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.backend import Backend, Completion, Generation, Prompt
    from launcher.config import RunConfig
    from launcher.progress import ProgressWriter
    from shards.world import World


@dataclass(frozen=True, slots=True)
class Repeat:
    """One pass over this rank's prompts. `wall_s` runs from a barrier of all ranks to this rank's last token.

    `prefill_s` and `decode_s` are sums over the batches, None for an engine that interleaves the two.
    """

    wall_s: float
    prefill_s: float | None
    decode_s: float | None
    completions: int
    prompt_tokens: int
    new_tokens: int
    ttft_s: tuple[float, ...]
    itl_s: tuple[float, ...]
    same_tokens: bool  # as the first repeat gave


def split(prompts: Sequence[Prompt], world: World, data_parallel: bool) -> list[Prompt]:
    """This rank's prompts: every world_size-th where ranks answer apart, all of them where they answer together."""
    return list(prompts[world.rank :: world.world_size]) if data_parallel else list(prompts)


def batches(prompts: Sequence[Prompt], size: int, calls: int) -> Iterator[list[Prompt]]:
    """`calls` batches of at most `size`, the last ones empty where the prompts have run out."""
    return (list(prompts[call * size : (call + 1) * size]) for call in range(calls))


def call_count(total: int, world: World, config: RunConfig) -> tuple[int, int]:
    """(batch size, number of generate calls), the same on every rank."""
    if config.backend.continuous_batching:
        return max(total, 1), 1
    share = -(-total // world.world_size) if config.backend.data_parallel else total
    return config.measure.batch_size, -(-share // config.measure.batch_size)


class Loop:
    """Runs one backend over this rank's prompts; `save(completion)` is given each completion of the first repeat."""

    def __init__(
        self,
        backend: Backend,
        config: RunConfig,
        world: World,
        progress: ProgressWriter,
        save: Callable[[Sequence[Completion]], None],
    ) -> None:
        self.backend, self.config, self.world, self.progress, self.save = backend, config, world, progress, save
        self.sampling = sampling_of(config)

    def run(self, prompts: Sequence[Prompt]) -> list[Repeat]:
        """Warm up, then the measured repeats."""
        own = split(prompts, self.world, self.config.backend.data_parallel)
        size, calls = call_count(len(prompts), self.world, self.config)
        self._warm_up(own[:size])
        first: dict[int, tuple[int, ...]] = {}
        return [
            self._repeat(number, list(batches(own, size, calls)), first)
            for number in range(self.config.measure.repeats)
        ]

    def _warm_up(self, batch: list[Prompt]) -> None:
        for number in range(self.config.measure.warmup):
            self.progress.enter(f"warmup {number + 1}/{self.config.measure.warmup}", self.sampling.max_new_tokens)
            self._call(batch)

    def _call(self, batch: list[Prompt]) -> Generation:
        steps = 0

        def on_step(tokens: int) -> None:
            nonlocal steps
            steps += 1
            self.progress.advance(steps, tokens=tokens)

        return self.backend.generate(batch, self.sampling, on_step)

    def _repeat(self, number: int, calls: list[list[Prompt]], first: dict[int, tuple[int, ...]]) -> Repeat:
        generations = []
        name = f"repeat {number + 1}/{self.config.measure.repeats}"
        self.backend.barrier()
        start = perf_counter()
        for place, batch in enumerate(calls):
            self.progress.enter(f"{name} batch {place + 1}/{len(calls)}", self.sampling.max_new_tokens)
            generations.append(self._call(batch))
            if number == 0:
                self.save(generations[-1].completions)
        wall_s = perf_counter() - start
        made = [completion for generation in generations for completion in generation.completions]
        same = all(first.setdefault(item.index, item.token_ids) == item.token_ids for item in made)
        return _summary(wall_s, generations, sum(len(p.token_ids) for batch in calls for p in batch), same)


def _summary(wall_s: float, generations: list[Generation], prompt_tokens: int, same: bool) -> Repeat:
    made = [completion for generation in generations for completion in generation.completions]
    prefill = [generation.prefill_s for generation in generations if generation.prefill_s is not None]
    decode = [generation.decode_s for generation in generations if generation.decode_s is not None]
    return Repeat(
        wall_s=wall_s,
        prefill_s=sum(prefill) if len(prefill) == len(generations) else None,
        decode_s=sum(decode) if len(decode) == len(generations) else None,
        completions=len(made),
        prompt_tokens=prompt_tokens,
        new_tokens=sum(len(completion.token_ids) for completion in made),
        ttft_s=tuple(item.ttft_s for item in made if item.ttft_s is not None),
        itl_s=tuple(gap for item in made for gap in item.itl_s),
        same_tokens=same,
    )
