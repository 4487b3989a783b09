"""Speculative decoding: one forward of the target checks the draft tokens of each row, and yields the accepted ones and
one more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.backends.sampling import Sampler
from launcher.backends.slots.drafting.acceptance import greedy, sampled
from launcher.results.figures.speculation import ACCEPTED, GUESSED

if TYPE_CHECKING:
    from launcher.backends.slots.drafting.guesses import AheadSlots, Generators, Guesser, Guesses
    from launcher.backends.slots.schedule import Step
    from launcher.config.schema import SamplingConfig


@dataclass(frozen=True, slots=True)
class Checked:
    """The tokens that a step yields for each of its rows, and the gap between the two largest logits at each."""

    forward: Step
    number: int
    tokens: list[list[int]]
    gaps: list[list[float]]

    def values(self) -> tuple[list[list[int]], list[list[float]]]:
        return self.tokens, self.gaps


class Speculation:
    """The speculative steps of one call of a decoder."""

    def __init__(
        self, guesser: Guesser, slots: AheadSlots, sampler: Sampler, sampling: SamplingConfig, ahead: int
    ) -> None:
        self.guesser, self.slots, self.sampler, self.ahead = guesser, slots, sampler, ahead
        self.drafting = Sampler(sampling, sampler.seed, sampler.device)
        self.max_new_tokens = sampling.max_new_tokens
        self.guessed = self.accepted = 0

    @property
    def counters(self) -> dict[str, float]:
        return {GUESSED: self.guessed, ACCEPTED: self.accepted}

    def guess(self, forward: Step, generators: Generators) -> Guesses:
        """Draft tokens for the rows of a step; none for the last token of an answer, which the target makes itself."""
        most = [min(self.ahead, self.max_new_tokens - len(sequence.token_ids) - 1) for sequence in forward.sequences]
        guesses = self.guesser.guess(forward, most, self.drafting, generators)
        self.guessed += sum(guesses.counts)
        return guesses

    def check(self, forward: Step, number: int, guesses: Guesses, generators: Generators) -> Checked:
        """Decode the newest token of each row together with its draft tokens, and keep the accepted ones."""
        slots, rows = self.slots, len(forward.sequences)
        slots.move(forward)
        ids = torch.cat((slots.tokens[:rows, None], guesses.tokens), 1)
        logits = slots.step_on(forward, ids, slots.positions[:rows])
        counts = torch.tensor(guesses.counts, device=slots.device)
        best, gaps = (values.view(rows, -1).to(slots.device) for values in self.sampler.best(logits.flatten(0, 1)))
        if self.sampler.is_greedy:
            tokens, accepted = greedy(best, guesses.tokens, counts)
        else:
            target = self.sampler.weights(logits.flatten(0, 1)).view(logits.shape).to(slots.device)
            uniform = torch.ones(guesses.tokens.shape, device=slots.device)
            for row, count, generator in zip(uniform, guesses.counts, generators, strict=True):
                row[:count].uniform_(generator=generator)
            noise = self.sampler.noise(target[:, 0], generators)
            tokens, accepted = sampled(target, guesses.tokens, counts, guesses.drafted, uniform, noise)
        slots.tokens[:rows].copy_(tokens.gather(1, accepted[:, None])[:, 0])
        slots.positions[:rows].add_(accepted + 1)
        kept = [count + 1 for count in accepted.tolist()]
        self.accepted += sum(kept) - rows
        return Checked(
            forward,
            number,
            [row[:count] for row, count in zip(tokens.tolist(), kept, strict=True)],
            [row[:count] for row, count in zip(gaps.tolist(), kept, strict=True)],
        )
