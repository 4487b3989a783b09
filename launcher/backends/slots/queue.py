"""The prompts that wait, and the ranks that they are given to."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from launcher.backends.base import Prompt
    from launcher.backends.slots.schedule import Schedule


class Queue:
    """The prompts of a call, and which rank is given each: the one that has most free slots. Of several each is given
    one of the next, the longest to that which was given the fewest tokens.

    Alone, or where ranks answer together, there is one schedule. Ranks that answer apart keep in step: where it is
    known when answers end each follows the schedules of all, else they tell each other how many slots are free. Where
    their forwards need no other rank (`is_apart`) they do so no longer once all prompts are given.
    """

    def __init__(
        self,
        prompts: SequenceOf[Prompt],
        schedules: SequenceOf[Schedule],
        rank: int,
        votes: bool,
        is_apart: bool = False,
    ) -> None:
        self.prompts = deque(prompts)
        self.tokens = [0] * len(schedules)  # of the prompts that each rank was given
        self.schedules, self.own, self.votes, self.is_apart = schedules, schedules[rank], votes, is_apart

    def fill(self) -> bool:
        """Give prompts to free slots; whether this rank has something to do, or any for which it is needed."""
        if self.is_apart and not self.prompts:
            return self.own.free < len(self.own.seats)
        free = [schedule.free for schedule in self.schedules]
        if self.votes:
            told = [torch.zeros(1, dtype=torch.long) for _ in free]
            dist.all_gather(told, torch.tensor([self.own.free]))
            free = [int(one) for one in told]
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
        """Note what the other ranks do beside this one's forward, where that is known."""
        for schedule in self.schedules if not self.votes else ():
            if schedule is not self.own and (forward := schedule.next()):
                schedule.begin(forward)
