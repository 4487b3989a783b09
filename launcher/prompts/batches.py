"""The division of prompts over ranks and calls."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.machine.world import World


def split(prompts: Sequence[Prompt], world: World, config: RunConfig) -> list[Prompt]:
    """The prompts of this rank: every world_size-th if ranks answer their own prompts, otherwise all.

    The longest come first: prompts of similar lengths share a batch, which minimizes padding; ranks have similar
    batches at the same time; and a shortage of memory shows in the first batch.
    """
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
    if config.splits_prompts:
        return ordered[world.rank :: world.world_size]
    return ordered


def batches(prompts: Sequence[Prompt], size: int, calls: int) -> Iterator[list[Prompt]]:
    """`calls` batches of at most `size` prompts; the last ones may be empty."""
    return (list(prompts[call * size : (call + 1) * size]) for call in range(calls))


def warm_up_batch(prompts: Sequence[Prompt], world: World, config: RunConfig) -> list[Prompt]:
    """The prompts of a warm-up: one batch, one prompt per slot, or all of them for vLLM."""
    share = split(prompts, world, config)
    if config.backend.continuous_batching:
        return share
    if config.backend.data_parallel and not config.splits_prompts:
        ranks = world.world_size
    else:
        ranks = 1
    return share[: config.measure.batch_size * ranks]


def call_count(total: int, world: World, config: RunConfig) -> tuple[int, int]:
    """(batch size, number of generate calls), the same on every rank."""
    if config.is_continuous:
        return max(total, 1), 1
    share = total
    if config.backend.data_parallel:
        share = ceil(total / world.world_size)
    return config.measure.batch_size, ceil(share / config.measure.batch_size)
