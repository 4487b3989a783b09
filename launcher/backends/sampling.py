"""The next token from logits: the most likely one, or a sample from the prompt's own random generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shards.parallel.tensor_parallel import Best, VocabularyHead, best_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import SamplingConfig


class Sampler:
    """Chooses the next token of each row, greedily or by sampling, from the output of the model's `head`.

    Each prompt has its own random generator, so that its sample depends only on the seed and its index: not on the
    batch, the rank or the number of ranks. Sampling never synchronizes with the device, and allocates nothing once its
    buffers are large enough; results are valid until the next call, except those of `draw`.
    """

    def __init__(self, sampling: SamplingConfig, seed: int, device: torch.device, head: object = None) -> None:
        self.is_greedy = sampling.temperature == 0
        self.best: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = self._best
        self.buffers: Best | None = None
        self.scratch: Scratch | None = None
        if isinstance(head, VocabularyHead):
            head.gathering = not self.is_greedy
            if self.is_greedy:
                self.best = head.best
        self.sampling, self.seed, self.device = sampling, seed, device

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
        """The chosen token of each row of `logits` [rows, vocabulary], and the gap between its two largest logits."""
        best, gaps = self.best(logits)
        return (best if self.is_greedy else self._drawn(self.weights(logits), generators)), gaps

    def draw(
        self, logits: torch.Tensor, generators: Sequence[torch.Generator | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token for each row of `logits` (over the whole vocabulary), and the probabilities that it was drawn from,
        None if greedy. Returns new tensors."""
        if self.is_greedy:
            return best_of(logits)[0], None
        weights = self.weights(logits)
        return self._drawn(weights, generators).clone(), weights.clone()

    def _drawn(self, weights: torch.Tensor, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
        """A sample by exponential noise, as torch.multinomial draws one: the argmax of weight / noise."""
        noise = self.noise(weights, generators)
        return torch.argmax(torch.div(weights, noise, out=noise), -1, out=self._scratch(weights).token[: len(weights)])

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """The probability of each token after temperature, top_k and top_p."""
        sampling, rows = self.sampling, len(logits)
        scratch = self._scratch(logits)
        scores, weights, is_hidden = scratch.scores[:rows], scratch.weights[:rows], scratch.is_hidden[:rows]
        torch.div(logits, sampling.temperature, out=scores)
        if scratch.likely is not None:
            values, tokens = (each[:rows] for each in scratch.likely)
            torch.topk(scores, values.shape[1], out=(values, tokens))
            scores.masked_fill_(torch.lt(scores, values[:, -1:], out=is_hidden), -torch.inf)
        if scratch.ordered is not None:
            values, tokens, is_rare = (each[:rows] for each in scratch.ordered)
            torch.sort(scores, -1, out=(values, tokens))
            shares = torch.cumsum(torch.softmax(values, -1, out=weights), -1, out=values)
            torch.le(shares, 1 - sampling.top_p, out=is_rare)
            is_rare[:, -1:].fill_(False)
            scores.masked_fill_(is_hidden.scatter_(1, tokens, is_rare), -torch.inf)
        return torch.softmax(scores, -1, out=weights)

    def noise(self, weights: torch.Tensor, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
        """Exponential noise for weights [rows, vocabulary], from each row's own generator if it has one."""
        noise = self._scratch(weights).scores[: len(weights)].fill_(1)
        for row, generator in zip(noise, generators, strict=False):
            if generator is not None:
                row.exponential_(generator=generator)
        return noise

    def _scratch(self, logits: torch.Tensor) -> Scratch:
        if self.scratch is None or len(logits) > len(self.scratch.scores):
            self.scratch = Scratch(logits, self.sampling)
        return self.scratch


class Scratch:
    """The buffers of a draw for as many rows as `logits` [rows, vocabulary] has: scores (overwritten by noise),
    probabilities and tokens; with top_k the top k scores and tokens, with top_p all of them sorted."""

    def __init__(self, logits: torch.Tensor, sampling: SamplingConfig) -> None:
        rows, size = logits.shape
        self.scores, self.weights = torch.empty_like(logits), torch.empty_like(logits)
        self.token = logits.new_empty(rows, dtype=torch.long)
        self.is_hidden = logits.new_empty(rows, size, dtype=torch.bool)
        self.likely: tuple[torch.Tensor, torch.Tensor] | None = None
        self.ordered: Best | None = None
        if sampling.top_k:
            self.likely = _pair(logits, min(sampling.top_k, size))
        if sampling.top_p < 1:
            self.ordered = *_pair(logits, size), torch.empty_like(self.is_hidden)


def _pair(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised tensors for the scores and tokens of `count` candidates of each row."""
    values = logits.new_empty(len(logits), count)
    return values, values.new_empty(values.shape, dtype=torch.long)
