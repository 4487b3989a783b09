"""Arrival times of the prompts of a set, for an engine that accepts them at any time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig


def arrivals_of(config: RunConfig, prompts: Sequence[Prompt]) -> tuple[float, ...] | None:
    """The arrival times of the prompts in seconds from the start, in order; None if `load` sets none.

    ConfigError for a prompt without an arrival time in the file.
    """
    if config.load.request_rate is not None:
        return poisson_arrivals(len(prompts), config.load.request_rate, config.seed)
    if not config.load.arrivals:
        return None
    moments = []
    for prompt in prompts:
        if prompt.arrival_s is None:
            fact = f"load.arrivals=true, and prompt {prompt.index} has no arrival_s."
            raise ConfigError(
                fact, 'load.arrivals=false, or prompts.path= a .jsonl with {"prompt": "...", "arrival_s": 0.5} a line'
            )
        moments.append(prompt.arrival_s)
    return tuple(moments)


def poisson_arrivals(count: int, rate: float, seed: int) -> tuple[float, ...]:
    """`count` arrival times of a Poisson process with `rate` per second; the same on every machine for a given seed."""
    draw = random.Random(seed)
    moment, moments = 0.0, []
    for _ in range(count):
        moment += draw.expovariate(rate)
        moments.append(moment)
    return tuple(moments)


@dataclass(slots=True)
class Pacing:
    """Decides when the prompts of a call begin, for an engine that runs in this process.

    `begun` of `count` prompts have begun; times are in seconds from the start of the call.
    """

    count: int
    concurrency: int | None = None
    arrivals: tuple[float, ...] | None = None
    begun: int = 0

    @classmethod
    def of(cls, config: RunConfig, prompts: Sequence[Prompt]) -> Self:
        """The pacing of a call with these prompts, in their order."""
        return cls(len(prompts), config.load.concurrency, arrivals_of(config, prompts))

    def due(self, moment: float, open_now: int) -> range:
        """The positions of the prompts that begin now, with `open_now` others in progress; counts them as begun."""
        end = self.count
        if self.concurrency is not None:
            end = min(end, self.begun + max(self.concurrency - open_now, 0))
        if self.arrivals is not None:
            end = self.begun
            while end < self.count and self.arrivals[end] <= moment:
                end += 1
        indices = range(self.begun, end)
        self.begun = end
        return indices

    def wait_s(self, moment: float) -> float:
        """Seconds until the next prompt is due."""
        if self.arrivals is None or self.begun == self.count:
            return 0.0
        return max(self.arrivals[self.begun] - moment, 0.0)
