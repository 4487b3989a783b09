"""Decode steps of a few fixed sizes, prepared before the measurement: as CUDA graphs, or compiled by inductor."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.slots.device import Forward, Slots

REACHES = 128
"""A graph spans as many positions as the longest row has, rounded up to a multiple of REACHES."""


def up_to(value: int, sizes: list[int]) -> int:
    """The smallest of the sorted sizes that is at least `value`."""
    return next(size for size in sizes if size >= value)


def doubled(first: int, last: int) -> list[int]:
    """`first`, doubled repeatedly while below `last`, and `last`."""
    sizes = [first << number for number in range(last.bit_length())]
    return [size for size in sizes if size < last] + [last]


class Graphs:
    """CUDA graphs of a step, one for each number of rows (powers of two) and each reach (multiples of 128).

    A replay launches all kernels of a step at once; rows that decode nothing are computed too. All graphs share one
    memory pool: only one is replayed at a time, and its result is read before the next. They read their inputs where
    `Slots.lay_out` writes them, at the same addresses for all; they contain no random sampling.

    They are captured on the same stream as the forwards before them, because libraries allocate a workspace for each
    stream and keep it. RuntimeError, before the capture, for a forward that synchronizes with the device.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.rows = doubled(1, slots.cache.slots)
        self.reaches = [*range(REACHES, slots.cache.length, REACHES), slots.cache.length]
        self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        for reach in reversed(self.reaches):  # the largest first: the others reuse its memory
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
        # Other threads of this process (NCCL's watchdog) may make CUDA calls that a global capture would forbid.
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
    """A context in which synchronizing with the device raises RuntimeError. Inside a capture it would break the capture
    and leave CUDA's allocator in an undefined state."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Compiled:
    """A forward compiled for all rows, and for reaches of 128 tokens, doubled repeatedly: compiling each takes a
    minute."""

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
