"""A decode step of a few fixed sizes, made before the clocks start: as CUDA graphs, or as code of inductor."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.slots.device import Forward, Slots

REACHES = 128
"""A graph spans as many positions as the longest row has, rounded up to a multiple of these."""


def up_to(value: int, sizes: list[int]) -> int:
    """The least of the sizes, which are in order, that is not below a value."""
    return next(size for size in sizes if size >= value)


def doubled(first: int, last: int) -> list[int]:
    """`first`, twice that and so on below `last`, and `last`."""
    sizes = [first << number for number in range(last.bit_length())]
    return [size for size in sizes if size < last] + [last]


class Graphs:
    """CUDA graphs of a step, one for each number of rows (powers of two) and each reach (multiples of 128).

    A replay launches all kernels of a step at once. Rows that decode nothing are computed beside the others. All graphs
    use one pool of memory: they are replayed one at a time, and what one leaves is read before the next. They read
    where `Slots.lay_out` writes, the same addresses for all; nothing in them is drawn by chance.

    They are captured on the stream of the forwards before them, in which libraries make their workspaces: each stream
    has some of its own, and they stay. RuntimeError for a forward that waits for the device, before it is captured.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.rows = doubled(1, slots.cache.slots)
        self.reaches = [*range(REACHES, slots.cache.length, REACHES), slots.cache.length]
        self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        for reach in reversed(self.reaches):  # the largest first, in whose memory the others find room
            for rows in reversed(self.rows):
                self.graphs[rows, reach] = self._captured(rows, reach)

    def _captured(self, rows: int, reach: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph, and the logits that each replay of it writes."""
        slots, side = self.slots.lay_out(rows, reach), self.side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            slots.forward(rows, reach)
            with no_waiting():
                slots.forward(rows, reach)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process (NCCL's watchdog) may ask CUDA for what a capture of all threads forbids.
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            logits = slots.forward(rows, reach)
        return graph, logits

    def __call__(self, rows: int, longest: int) -> torch.Tensor:
        size = up_to(rows, self.rows), up_to(longest, self.reaches)
        self.slots.lay_out(*size)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """While this lasts, what would wait for the device raises RuntimeError. In a capture it would break that, and leave
    CUDA's allocator in the middle of it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Compiled:
    """A forward compiled for all rows, and for reaches of 128 tokens, twice that and so on: each takes a minute."""

    def __init__(self, slots: Slots, forward: Forward) -> None:
        self.slots, self.forward = slots, forward
        self.rows = slots.cache.slots
        self.reaches = doubled(REACHES, slots.cache.length)
        for reach in self.reaches:
            slots.lay_out(self.rows, reach)
            forward(self.rows, reach)

    def __call__(self, rows: int, longest: int) -> torch.Tensor:
        reach = up_to(longest, self.reaches)
        self.slots.lay_out(self.rows, reach)
        return self.forward(self.rows, reach)
