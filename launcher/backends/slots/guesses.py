"""Guesses of the next tokens of each row: looked up in its own, or made by a draft model with slots of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from launcher.backends.slots.cache import Stepping
from launcher.backends.slots.device import BLOCK, Slots
from launcher.backends.slots.ngrams import Ngrams

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from launcher.backends.sampling import Sampler
    from launcher.backends.slots.schedule import Read, Step

    Generators = SequenceOf[torch.Generator | None]


@dataclass(frozen=True, slots=True)
class Guesses:
    """Tokens [rows, width] of which a row has so many as `counts` [rows] says, and the distributions [rows, width,
    vocabulary] that they were drawn from, where they were."""

    tokens: torch.Tensor
    counts: tuple[int, ...]
    drafted: torch.Tensor | None = None


class Guesser(Protocol):
    """The interface of guessers; a guesser sees each forward of the target, in order."""

    @property
    def packs(self) -> bool:
        """Once it is ready: it can be told of prompts that lie in one row."""

    def ready(self, slots: int, length: int, ahead: int) -> None:
        """Be ready for sequences of at most `length` tokens, `ahead` of them guessed, in so many slots."""

    def read(self, forward: Read) -> None:
        """The target has read prompts, or a chunk of one."""

    def guess(self, forward: Step, most: SequenceOf[int], sampler: Sampler, generators: Generators) -> Guesses:
        """Guesses for the rows of a step, at most so many for each as `most` says."""


class AheadSlots(Slots):
    """Slots whose rows decode several tokens in a step, `ahead` of them guesses that the next step may overwrite.

    Each layer has places for these beside what a row may see; what was refused lies behind a row's newest token, where
    nothing looks until it is overwritten.
    """

    def __init__(self, model: Any, slots: int, length: int, device: torch.device, ahead: int) -> None:
        super().__init__(model, slots, length, device, spare=ahead)
        self.ahead = ahead
        self.last_position = length - ahead - 1  # of a token that counts
        windows = {layer.is_sliding: layer.window for layer in self.cache.layers}
        self.windows = {"sliding_attention" if kind else "full_attention": window for kind, window in windows.items()}

    def step_on(self, forward: Step, ids: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The logits [rows, tokens, vocabulary] of `ids` [rows, tokens] which lie from the places `first` [rows] on."""
        rows, count = ids.shape
        self.computed_rows += rows
        longest = max(one.length for one in forward.sequences)
        reach = min(-(-(longest + self.ahead + 1) // BLOCK) * BLOCK, self.cache.length)
        positions = first[:, None] + self.places[:count]
        self.cache.do(Stepping(rows, positions, reach))
        shown = positions.clamp(max=self.last_position)  # beyond it lie paddings, of which nothing is kept
        return self._all_logits(ids, shown, self._mask(positions, reach), count)

    def _mask(self, positions: torch.Tensor, reach: int) -> Any:
        """The mask for tokens at `positions` [rows, tokens], [rows, 1, tokens, reach], by kinds of layers."""
        now, newest = positions[..., None], positions[:, -1:, None]
        masks = {}
        for kind, size in self.mask_sizes.items():
            places = self.places[: min(reach, size)]
            window = self.windows[kind]
            if window is None:
                seen = places <= now
            else:
                lies = newest - (newest - places) % size  # the newest token that has been at a place
                seen = (lies >= 0) & (lies <= now) & (lies > now - window)
            masks[kind] = torch.where(seen, self.seen, self.hidden)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


class Lookup:
    """Guesses that are looked up in the tokens of each row."""

    packs = True

    def __init__(self, most: int, least: int, device: torch.device) -> None:
        self.most, self.least, self.device = most, least, device
        self.known: dict[int, Ngrams] = {}  # of the prompts that decode, by their indices

    def ready(self, slots: int, length: int, ahead: int) -> None:
        self.known.clear()

    def read(self, forward: Read) -> None:
        """Prompts are looked at when their rows first step."""

    def guess(self, forward: Step, most: SequenceOf[int], sampler: Sampler, generators: Generators) -> Guesses:
        known = {}
        for sequence in forward.sequences:
            prompt = sequence.prompt
            ngrams = self.known.get(prompt.index)
            if ngrams is None:
                ngrams = Ngrams(self.most, self.least)
                ngrams.add(prompt.token_ids)
            ngrams.add(sequence.token_ids[len(ngrams.tokens) - len(prompt.token_ids) :])
            known[prompt.index] = ngrams
        self.known = known
        guessed = [ngrams.guess(count) for ngrams, count in zip(self.known.values(), most, strict=True)]
        counts = tuple(map(len, guessed))
        width = max(counts)
        rows = [tokens + [0] * (width - len(tokens)) for tokens in guessed]
        return Guesses(torch.tensor(rows, dtype=torch.long, device=self.device).view(len(rows), width), counts)


class Draft:
    """Guesses of a smaller model, which reads what the target reads. Its slots are of the same rows."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.slots: AheadSlots | None = None

    @property
    def packs(self) -> bool:
        return self.slots is not None and self.slots.packs

    def ready(self, slots: int, length: int, ahead: int) -> None:
        if self.slots is None or self.slots.cache.slots != slots or self.slots.cache.length < length:
            self.slots = None
            self.slots = AheadSlots(self.model, slots, length, self.device, ahead)

    def read(self, forward: Read) -> None:
        assert self.slots is not None
        self.slots.read(forward)

    def guess(self, forward: Step, most: SequenceOf[int], sampler: Sampler, generators: Generators) -> Guesses:
        """Guess by as many forwards as the row with most guesses needs. The first forward has two tokens of each row:
        if all its guesses were accepted, the draft has not seen the last but one; otherwise it is written again."""
        assert self.slots is not None
        self.slots.move(forward)
        last = [(one.prompt.token_ids + tuple(one.token_ids[-2:]))[-2:] for one in forward.sequences]
        ids = torch.tensor(last, device=self.device)
        first = torch.tensor([one.length - 1 for one in forward.sequences], device=self.device)
        tokens, drafted = [], []
        for number in range(max(most)):
            logits = self.slots.step_on(forward, ids, first)[:, -1]
            mine = [generator if number < count else None for generator, count in zip(generators, most, strict=True)]
            chosen, weights = sampler.draw(logits, mine)
            tokens.append(chosen)
            drafted.append(weights)
            first = first + ids.shape[1]
            ids = chosen[:, None]
        if not tokens:
            return Guesses(torch.zeros(len(most), 0, dtype=torch.long, device=self.device), tuple(most))
        weights = None if sampler.is_greedy else torch.stack([one for one in drafted if one is not None], 1)
        return Guesses(torch.stack(tokens, 1), tuple(most), weights)
