"""The waiting prompts of a call, and their assignment to ranks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from launcher.backends.base import Prompt
    from launcher.backends.slots.schedule import Schedule


class Queue:
    """The waiting prompts of a call. The next prompt goes to the rank with most free slots; among several such ranks
    the longest of the next prompts goes to the rank that was given the fewest tokens.

    A single rank, or ranks that answer together, have one schedule. Data-parallel ranks must make the same assignments:
    if the ends of answers are known in advance each rank follows the schedules of all, otherwise (`votes`) they
    exchange the number of free slots by `gather`. Ranks whose forwards are not collective (`is_apart`) stop exchanging
    it once all prompts are assigned.
    """

    def __init__(
        self,
        prompts: SequenceOf[Prompt],
        schedules: SequenceOf[Schedule],
        rank: int,
        votes: bool,
        is_apart: bool = False,
        gather: Callable[[torch.Tensor, torch.Tensor], object] = dist.all_gather_into_tensor,
    ) -> None:
        self.prompts = deque(prompts)
        self.tokens = [0] * len(schedules)  # prompt tokens assigned to each rank so far
        self.schedules, self.own, self.votes, self.is_apart = schedules, schedules[rank], votes, is_apart
        self.gather = gather

    def fill(self) -> bool:
        """Assign prompts to free slots. True if this rank has work, or others need it for their collectives."""
        if self.is_apart and not self.prompts:
            return self.own.free < len(self.own.seats)
        free = [schedule.free for schedule in self.schedules]
        if self.votes:
            counts = torch.zeros(len(free))
            self.gather(counts, torch.tensor([float(self.own.free)]))
            free = [int(one) for one in counts.tolist()]
        while self.prompts and (most := max(free)):
            ranks = [rank for rank, number in enumerate(free) if number == most]
            prompts = [self.prompts.popleft() for _ in range(min(len(ranks), len(self.prompts)))]
            ranks.sort(key=lambda rank: self.tokens[rank])
            prompts.sort(key=lambda prompt: len(prompt.token_ids), reverse=True)
            for rank, prompt in zip(ranks, prompts, strict=False):
                free[rank] -= 1
                self.tokens[rank] += len(prompt.token_ids)
                if not self.votes or self.schedules[rank] is self.own:
                    self.schedules[rank].add(prompt)
        return any(number < len(schedule.seats) for number, schedule in zip(free, self.schedules, strict=True))

    def follow(self) -> None:
        """Advance the schedules of the other ranks, if they are known."""
        for schedule in self.schedules if not self.votes else ():
            if schedule is not self.own and (forward := schedule.next()):
                schedule.begin(forward)
