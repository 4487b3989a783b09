"""The quality of a model on a text, by teacher forcing: how well it predicts each token, whatever its speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.base import Score


@dataclass(frozen=True, slots=True)
class Quality:
    """The score on `tokens` tokens of a text, each after all before it in its window (teacher forcing): the perplexity,
    and the most likely token in the place of each.

    The perplexity is exp(-sum(log p) / tokens); it compares runs of one tokenizer only.
    """

    text: str
    tokens: int
    perplexity: float
    best_tokens: tuple[int, ...]


def quality_of(text: str, scores: Sequence[Score]) -> Quality:
    """The figures over all windows of a text."""
    best = tuple(token for score in scores for token in score.best_tokens)
    mean = sum(score.log_likelihood for score in scores) / len(best)
    return Quality(text.rpartition("/")[2], len(best), math.exp(min(-mean, 700.0)), best)


def agreement(base: Quality | None, other: Quality | None) -> float | None:
    """The share of places with the same most likely token (top-1 agreement); None for other texts or other windows."""
    if base is None or other is None or (base.text, base.tokens) != (other.text, other.tokens):
        return None
    same = sum(left == right for left, right in zip(base.best_tokens, other.best_tokens, strict=True))
    return same / base.tokens
