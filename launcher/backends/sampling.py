"""The next token from logits: the best, or one drawn from a generator of each prompt's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shards.parallel.tensor_parallel import Best, VocabularyHead, best_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import SamplingConfig


class Sampler:
    """Chooses the next tokens of some rows, greedily or by chance, from what the `head` of a model has made of them.

    Each prompt is drawn for from a generator of its own, so that its sample depends on the seed and on its index only:
    not on the batch, the rank or the number of ranks. No draw waits for the device.
    """

    def __init__(self, sampling: SamplingConfig, seed: int, device: torch.device, head: object = None) -> None:
        self.is_greedy = sampling.temperature == 0
        self.best: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = self._best
        self.buffers: Best | None = None
        if isinstance(head, VocabularyHead):
            head.gathering = not self.is_greedy
            if self.is_greedy:
                self.best = head.best
        self.processors = _processors(sampling)
        self.seed, self.device = seed, device

    def _best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.buffers is None or len(logits) > len(self.buffers[0]) or logits.dtype is not self.buffers[0].dtype:
            value = logits.new_empty(len(logits), 1)
            self.buffers = value, value.new_empty(value.shape, dtype=torch.long), torch.empty_like(value)
        return best_of(logits, self.buffers)

    def generator(self, prompt: Prompt) -> torch.Generator | None:
        """The random generator for the tokens of a prompt; None for greedy decoding."""
        if self.is_greedy:
            return None
        return torch.Generator(self.device).manual_seed((self.seed << 32) + prompt.index)

    def choose(
        self, logits: torch.Tensor, generators: Sequence[torch.Generator | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen token of each row of `logits` [rows, vocabulary], and the gap between the two largest of them."""
        best, gaps = self.best(logits)
        return (best if self.is_greedy else self.draw(logits, generators)[0]), gaps

    def draw(
        self, logits: torch.Tensor, generators: Sequence[torch.Generator | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token for each row of a whole vocabulary, and what it was drawn from; None where it is the best."""
        if self.is_greedy:
            return best_of(logits)[0], None
        weights = self.weights(logits)
        return (weights / self.noise(weights, generators)).argmax(-1), weights

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """The probability with which each token is drawn."""
        weights: torch.Tensor = self.processors(None, logits).softmax(-1)
        return weights

    def noise(self, weights: torch.Tensor, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
        """Exponential noise for a draw from weights [rows, vocabulary], by each row's own generator if it has one."""
        noise = torch.ones_like(weights)
        for row, generator in zip(noise, generators, strict=False):
            if generator is not None:
                row.exponential_(generator=generator)
        return noise


def _processors(sampling: SamplingConfig) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.temperature > 0 and sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors
