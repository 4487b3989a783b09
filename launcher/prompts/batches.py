"""How prompts are divided over ranks and calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.machine.world import World


def split(prompts: Sequence[Prompt], world: World, data_parallel: bool) -> list[Prompt]:
    """This rank's prompts: every world_size-th where ranks answer apart, all of them where they answer together.

    The longest come first: prompts of like lengths share a batch, which then has the least padding, ranks have like
    batches at the same time, and where memory does not suffice, that is seen at once.
    """
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
    return ordered[world.rank :: world.world_size] if data_parallel else ordered


def batches(prompts: Sequence[Prompt], size: int, calls: int) -> Iterator[list[Prompt]]:
    """`calls` batches of at most `size`, the last ones empty where the prompts have run out."""
    return (list(prompts[call * size : (call + 1) * size]) for call in range(calls))


def call_count(total: int, world: World, config: RunConfig) -> tuple[int, int]:
    """(batch size, number of generate calls), the same on every rank."""
    if config.backend.continuous_batching:
        return max(total, 1), 1
    share = -(-total // world.world_size) if config.backend.data_parallel else total
    return config.measure.batch_size, -(-share // config.measure.batch_size)
