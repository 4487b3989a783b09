"""The measurement loop: warm up, then answer the whole prompt set `repeats` times, in one call or batch by batch.

A resumed run first answers the prompts whose completions are not saved yet, in the same batches as an uninterrupted
run, and then makes the repeats that no attempt has finished.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from launcher.backends.base import CompilingBackend, ScoringBackend, TracingBackend
from launcher.prompts.batches import batches, call_count, split, warm_up_batch
from launcher.prompts.prompts import sampling_of
from launcher.results.figures.metrics import summed
from launcher.results.figures.quality import quality_of
from launcher.results.measured import Repeat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from launcher.backends.base import Backend, Compilation, Completion, Generation, Prompt, Trace
    from launcher.config.schema import RunConfig
    from launcher.results.completions import Saved
    from launcher.results.figures.quality import Quality
    from launcher.results.measured import RequestFailure
    from launcher.run_dir.progress import ProgressWriter
    from shards.machine.world import World


def schedule(
    prompts: Sequence[Prompt], world: World, config: RunConfig, saved: Saved
) -> list[tuple[int, list[list[Prompt]]]]:
    """The numbers of the repeats still to be made, with this rank's batches; every rank has the same number of batches.

    The first repeat leaves out saved prompts, and batches in which no rank has unsaved prompts. If all prompts are
    saved but no repeat is complete, and `measure.repeats` is 1, it is made in full, so that there is a measurement.
    """
    size, calls = call_count(len(prompts), world, config)
    whole = list(batches(split(prompts, world, config), size, calls))
    answered = {completion.index for completion in saved.completions}
    parts = [split(prompts, replace(world, rank=rank), config) for rank in range(world.world_size)]
    left = [
        any(prompt.index not in answered for part in parts for prompt in part[call * size : (call + 1) * size])
        for call in range(calls)
    ]
    missing = [[p for p in batch if p.index not in answered] for batch, some in zip(whole, left, strict=True) if some]
    numbers = [number for number in range(config.measure.repeats) if number not in saved.repeats]
    if not missing and (saved.repeats or len(numbers) > 1):
        numbers = [number for number in numbers if number > 0]
    repeats = [(number, whole) for number in numbers]
    if missing and 0 in numbers:
        repeats[0] = (0, missing)
    return repeats


class Keeper(Protocol):
    """Receives the loop's results. An exception from any method ends the loop."""

    def save(self, completions: Sequence[Completion], failures: Sequence[RequestFailure] = ()) -> None:
        """Save new completions, and the prompts that failed."""

    def save_repeat(self, repeat: Repeat) -> None:
        """Save the measurements of a repeat."""

    def between_batches(self) -> None:
        """Called when all work so far is saved: the place to end an interrupted rank."""


class Loop:
    """Runs one backend on this rank's prompts; `keeper` receives completions and measurements as they are made."""

    def __init__(
        self, backend: Backend, config: RunConfig, world: World, progress: ProgressWriter, keeper: Keeper
    ) -> None:
        self.backend, self.config, self.world, self.progress, self.keeper = backend, config, world, progress, keeper
        self.sampling = sampling_of(config)

    def trace(self, prompts: Sequence[Prompt], steps: int, is_traced: bool) -> Trace | None:
        """Answer one more batch on all ranks; ranks with `is_traced` trace `steps` of its decode steps."""
        sampling = replace(self.sampling, max_new_tokens=steps + 1, ignore_eos=True)
        trace: Trace | None = None
        num_steps = 0

        def on_step(new_tokens: int, finished: Sequence[Completion] = ()) -> None:
            nonlocal trace, num_steps
            if is_traced and num_steps == 0 and isinstance(self.backend, TracingBackend):  # prefill is over
                trace = self.backend.trace()
            if trace is not None and num_steps == steps:
                trace.stop()
            num_steps += 1

        self.progress.enter("profile", steps)
        self.backend.generate(warm_up_batch(prompts, self.world, self.config), sampling, on_step)
        return trace

    def score(self, windows: Sequence[Sequence[int]]) -> Quality | None:
        """Score the windows of a text; None without windows, or if the engine cannot score."""
        if not windows or not isinstance(self.backend, ScoringBackend):
            return None
        self.progress.enter("quality", len(windows))
        scores = []
        for number, window in enumerate(windows, 1):
            scores.append(self.backend.score(window))
            self.progress.advance(number)
        return quality_of(self.config.measure.quality or "", scores)

    def run(self, prompts: Sequence[Prompt], saved: Saved) -> None:
        """Make the repeats that `saved` does not contain."""
        first = {completion.index: completion.answer for completion in saved.completions if completion.failure is None}
        for number, calls in schedule(prompts, self.world, self.config, saved):
            self.keeper.save_repeat(self._repeat(number, calls, first))

    def warm_up(self, prompts: Sequence[Prompt]) -> Compilation | None:
        """Compile the engine's decode steps if it supports that, then answer a batch `warmup` times."""
        batch, compilation = warm_up_batch(prompts, self.world, self.config), None
        if isinstance(self.backend, CompilingBackend):
            steps = 0

            def on_step(new_tokens: int, finished: Sequence[Completion] = ()) -> None:
                nonlocal steps
                steps += 1
                self.progress.advance(steps)

            self.progress.enter("compile")
            compilation = self.backend.compile(batch, self.sampling, on_step)
        for number in range(self.config.measure.warmup):
            self._call(f"warmup {number + 1}/{self.config.measure.warmup}", batch, lambda finished: None)
        return compilation

    def _call(
        self, stage: str, batch: list[Prompt], keep: Callable[[Sequence[Completion]], None]
    ) -> tuple[Generation, int]:
        """Call the engine with a batch; returns its Generation and the number of steps that made a token.

        `keep` receives the newly completed answers after each step. With continuous batching the call can be
        interrupted between two steps.
        """
        is_continuous, total = self.config.is_continuous, self.sampling.max_new_tokens
        if is_continuous:
            total = len(batch)
        self.progress.enter(stage, total)
        steps = fruitful = done = 0

        def on_step(new_tokens: int, finished: Sequence[Completion] = ()) -> None:
            nonlocal steps, fruitful, done
            steps += 1
            fruitful += new_tokens > 0
            done += len(finished)
            if is_continuous:
                self.progress.advance(done, tokens=new_tokens)
            else:
                self.progress.advance(steps, tokens=new_tokens)
            keep(finished)
            if is_continuous:
                self.keeper.between_batches()

        return self.backend.generate(batch, self.sampling, on_step), fruitful

    def _repeat(self, number: int, calls: list[list[Prompt]], first: dict[int, tuple[int, ...] | str]) -> Repeat:
        """Make one repeat. `first` maps each prompt's index to its first answer; new prompts are added to it."""
        generations, decode_steps = [], 0
        same = True

        def keep(completions: Sequence[Completion], failures: Sequence[RequestFailure] = ()) -> None:
            nonlocal same
            new = [item for item in completions if item.index not in first]
            same &= all(first.setdefault(item.index, item.answer) == item.answer for item in completions)
            if number == 0 and (new or failures):
                self.keeper.save(new, failures)

        name = f"repeat {number + 1}/{self.config.measure.repeats}"
        self.backend.barrier()
        start = perf_counter()
        for call, batch in enumerate(calls, 1):
            self.keeper.between_batches()
            generation, steps = self._call(f"{name} batch {call}/{len(calls)}", batch, keep)
            keep(generation.completions, generation.failures)
            generations.append(generation)
            if generation.decode_steps is not None:
                decode_steps += generation.decode_steps
            else:
                decode_steps += max(steps - 1, 0)
        wall_s = sum_of_all(generation.wall_s for generation in generations) or perf_counter() - start
        asked = {prompt.index: len(prompt.token_ids) for batch in calls for prompt in batch}
        answers = [completion for generation in generations for completion in generation.completions]
        return Repeat(
            number=number,
            wall_s=wall_s,
            prefill_s=sum_of_all(generation.prefill_s for generation in generations),
            decode_s=sum_of_all(generation.decode_s for generation in generations),
            completions=len(answers),
            prompt_tokens=sum(asked[answer.index] for answer in answers),
            new_tokens=sum(answer.new_tokens for answer in answers),
            decode_steps=decode_steps,
            lengths=tuple((asked[answer.index], answer.new_tokens) for answer in answers),
            ttft_s=tuple(answer.ttft_s for answer in answers if answer.ttft_s is not None),
            itl_s=tuple(gap for answer in answers for gap in answer.itl_s),
            same_tokens=same,
            counters=summed(generation.counters for generation in generations),
            e2el_s=tuple(answer.e2el_s for answer in answers if answer.e2el_s is not None),
            failures=tuple(failure for generation in generations for failure in generation.failures),
            server=next((generation.server for generation in generations if generation.server is not None), None),
        )


def sum_of_all(seconds: Iterable[float | None]) -> float | None:
    """The sum, or None if a value is None."""
    total = 0.0
    for value in seconds:
        if value is None:
            return None
        total += value
    return total
