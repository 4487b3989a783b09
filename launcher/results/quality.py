"""The quality of a model on a text, by teacher forcing: how well it predicts each token, whatever its speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from launcher.backends.base import Score


KL_TOKENS = 512
"""Places of a text whose likeliest tokens a record keeps: about 150 kB."""

DECIMALS = 5  # of log-likelihoods in a record
LEAST_MASS = 1e-5
"""What is left beside the likeliest tokens is not known to less."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The score on `tokens` tokens of a text, each after all before it in its window (teacher forcing): the perplexity,
    and the most likely token in the place of each.

    The perplexity is exp(-sum(log p) / tokens); it compares runs of one tokenizer only. `likeliest` are the likeliest
    tokens in the first KL_TOKENS places, with their log-likelihoods in the same order.
    """

    text: str
    tokens: int
    perplexity: float
    best_tokens: tuple[int, ...]
    likeliest: tuple[tuple[int, ...], ...] = ()
    log_likelihoods: tuple[tuple[float, ...], ...] = ()


def quality_of(text: str, scores: Sequence[Score]) -> Quality:
    """The figures over all windows of a text."""
    best = tuple(token for score in scores for token in score.best_tokens)
    mean = sum(score.log_likelihood for score in scores) / len(best)
    places = [place for score in scores for place in score.likeliest][:KL_TOKENS]
    return Quality(
        text.rpartition("/")[2],
        len(best),
        math.exp(min(-mean, 700.0)),
        best,
        tuple(tuple(place) for place in places),
        tuple(tuple(round(value, DECIMALS) for value in place.values()) for place in places),
    )


def agreement(base: Quality | None, other: Quality | None) -> float | None:
    """The share of places with the same most likely token (top-1 agreement); None for other texts or other windows."""
    if base is None or other is None or (base.text, base.tokens) != (other.text, other.tokens):
        return None
    same = sum(left == right for left, right in zip(base.best_tokens, other.best_tokens, strict=True))
    return same / base.tokens


def kl_divergence(base: Quality | None, other: Quality | None) -> float | None:
    """The mean over places of D(P || Q) in nats, P the base's distribution of the next token and Q the other's.

    Of each place are known the likeliest tokens of both. With a cell for each token that both know, and one for all
    others, D = sum over cells of P log(P / Q): a lower bound of that over single tokens, by the log sum inequality
    (Cover and Thomas, Elements of Information Theory, theorem 2.7.1), and near it where the cells of single tokens have
    nearly all of P. None for other texts or windows, and for records that lack what it takes.
    """
    if base is None or other is None or (base.text, base.tokens) != (other.text, other.tokens):
        return None
    if not base.likeliest or len(base.likeliest) != len(other.likeliest):
        return None
    total = 0.0
    for ours, theirs in zip(_places(base), _places(other), strict=True):
        shared = ours.keys() & theirs.keys()
        cells = [(ours[token], theirs[token]) for token in shared]
        cells.append((_rest(ours, shared), _rest(theirs, shared)))
        total += sum(math.exp(p) * (p - q) for p, q in cells)
    return max(0.0, total / len(base.likeliest))


def _places(quality: Quality) -> list[dict[int, float]]:
    """The log-likelihoods of the likeliest tokens in each place."""
    pairs = zip(quality.likeliest, quality.log_likelihoods, strict=True)
    return [dict(zip(tokens, values, strict=True)) for tokens, values in pairs]


def _rest(place: dict[int, float], shared: Set[int]) -> float:
    """The log-likelihood of any other token than those."""
    return math.log(max(LEAST_MASS, 1 - sum(math.exp(place[token]) for token in shared)))
