"""The assignment of prompts to slots, and the order of the forwards. Bookkeeping only: no tensors, no device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.base import Prompt

NEAR = {"cpu": 16, "cuda": 256}
"""Prompts whose lengths differ by no more tokens are read together, padded: the padding costs about as much as one more
forward. If prompts can be packed into one row, all waiting ones are read together."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt in a slot. `row` is the slot, `read` the number of its prompt tokens in the cache, `begun` the number of
    new tokens whose forwards were launched. The lists hold the new tokens known so far, with the number of the forward
    that made each."""

    prompt: Prompt
    row: int = -1
    read: int = 0
    begun: int = 0
    token_ids: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    is_ended: bool = False

    @property
    def length(self) -> int:
        """Tokens in the cache after all launched forwards are done."""
        return self.read + max(self.begun - 1, 0)


@dataclass(frozen=True, slots=True)
class Read:
    """A forward that reads prompts, after the moves (from, to): a chunk of one prompt, or all tokens of several."""

    sequences: tuple[Sequence, ...]
    start: int
    width: int
    moves: tuple[tuple[int, int], ...] = ()
    is_packed: bool = False  # prompts of any lengths are concatenated in one row

    @property
    def num_tokens(self) -> int:
        """Tokens that the model is given, including padding."""
        if self.is_packed:
            return sum(len(sequence.prompt.token_ids) for sequence in self.sequences)
        return self.width * len(self.sequences)

    @property
    def is_last(self) -> bool:
        """True if this forward reads the prompts to their ends, and so makes the first new token of each."""
        return self.start + self.width >= len(self.sequences[0].prompt.token_ids)


@dataclass(frozen=True, slots=True)
class Step:
    """A forward that decodes the sequences in the first slots, after the moves (from, to)."""

    sequences: tuple[Sequence, ...]
    moves: tuple[tuple[int, int], ...]


class Schedule:
    """The schedule of the slots of one process.

    `next` returns the next forward, `begin` records that it was launched, `end` that a sequence has ended. Between two
    decode steps at most `prefill_tokens` prompt tokens are read. The first waiting prompt is read next, with all others
    of about its length, or with the ones after it if prompts are packed (`near` is None). A prompt takes the first free
    slot, one that is read in chunks the last slot; before a step the decoding sequences are moved to the first slots.
    """

    def __init__(self, slots: int, max_new_tokens: int, prefill_tokens: int, near: int | None) -> None:
        self.max_new_tokens, self.prefill_tokens, self.near = max_new_tokens, prefill_tokens, near
        self.seats: list[Sequence | None] = [None] * slots
        self.waiting: deque[Sequence] = deque()
        self.decoding = 0
        self.budget = prefill_tokens

    @property
    def free(self) -> int:
        """Slots that are not assigned to a prompt."""
        return len(self.seats) - self.decoding - len(self.waiting)

    def add(self, prompt: Prompt) -> None:
        """Assign a free slot to a prompt."""
        assert self.free > 0
        self.waiting.append(Sequence(prompt))

    def next(self) -> Read | Step | None:
        """The next forward; None if there is nothing to do."""
        if self.waiting and (self.budget > 0 or not self.decoding):
            first = self.waiting[0]
            left = len(first.prompt.token_ids) - first.read
            if first.read or left > self.prefill_tokens:
                first.row = len(self.seats) - 1
                return Read((first,), first.read, min(left, self.prefill_tokens), tuple(self._close_ranks()))
            if self.near is None:
                together = self._next_packed()
            else:
                together = self._next_alike(left, self.near)
            rows = [row for row, sequence in enumerate(self.seats) if sequence is None]
            group = list(zip(together, rows, strict=False))
            for sequence, row in group:
                sequence.row = row
            lengths = {len(sequence.prompt.token_ids) for sequence, _ in group}
            is_packed = self.near is None and len(lengths) > 1
            return Read(tuple(sequence for sequence, _ in group), 0, max(lengths), is_packed=is_packed)
        if not self.decoding:
            return None
        moves = tuple(self._close_ranks())
        return Step(tuple(sequence for sequence in self.seats[: self.decoding] if sequence), moves)

    def _next_alike(self, length: int, near: int) -> list[Sequence]:
        """Prompts that are about as long as the first, padded to the longest of them."""
        limit = min(length + near, self.prefill_tokens)  # longer prompts are read in several forwards
        longest = max(n for n in (len(sequence.prompt.token_ids) for sequence in self.waiting) if n <= limit)
        alike = [sequence for sequence in self.waiting if longest - near <= len(sequence.prompt.token_ids) <= longest]
        return alike[: max(min(self.budget, self.prefill_tokens) // longest, 1)]

    def _next_packed(self) -> list[Sequence]:
        """The first prompt and those that come next, up to one that is too long to be read with them."""
        room = max(min(self.budget, self.prefill_tokens), len(self.waiting[0].prompt.token_ids))
        ends = accumulate(len(sequence.prompt.token_ids) for sequence in self.waiting)
        return [sequence for sequence, end in zip(self.waiting, ends, strict=False) if end <= room]

    def _close_ranks(self) -> Iterator[tuple[int, int]]:
        """Move decoding sequences from the last slots to free ones among the first."""
        for target in range(self.decoding):
            if self.seats[target] is None:
                source = max(row for row, sequence in enumerate(self.seats) if sequence)
                moved = self.seats[source]
                assert moved is not None
                self.seats[target], self.seats[source] = moved, None
                moved.row = target
                yield source, target

    def begin(self, forward: Read | Step) -> None:
        """Record that a forward was launched. Sequences that need no further one leave their slots."""
        if isinstance(forward, Step):
            self.budget = self.prefill_tokens
            for sequence in forward.sequences:
                sequence.begun += 1
        else:
            self.budget -= forward.num_tokens
            for sequence in forward.sequences:
                sequence.read = min(forward.start + forward.width, len(sequence.prompt.token_ids))
                if forward.is_last:
                    self.waiting.remove(sequence)
                    self.seats[sequence.row] = sequence
                    self.decoding += 1
                    sequence.begun = 1
        for sequence in forward.sequences:
            if sequence.begun >= self.max_new_tokens:
                self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """Free the slot of a sequence, unless it is free already."""
        if self.seats[sequence.row] is sequence:
            self.seats[sequence.row] = None
            self.decoding -= 1
