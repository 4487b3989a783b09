"""The quality of a model on a text: how well it predicts each token, by teacher forcing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from launcher.backends.base import Score


KL_TOKENS = 512
"""The number of positions for which a record keeps the most likely tokens: about 150 kB."""

DECIMALS = 5  # of log-likelihoods in a record
LEAST_MASS = 1e-5
"""Lower bound for the probability of all other tokens together; smaller values are lost in a record's rounding."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The score on `tokens` tokens of a text, each predicted from the true tokens before it in its window (teacher
    forcing): the perplexity, and the most likely token at each position.

    The perplexity is exp(-sum(log p) / tokens); it only compares runs with the same tokenizer. `likeliest` are the most
    likely tokens at the first KL_TOKENS positions, with their log-likelihoods in the same order.
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
    """The share of positions with the same most likely token (top-1 agreement); None for other texts or windows."""
    if base is None or other is None or (base.text, base.tokens) != (other.text, other.tokens):
        return None
    same = sum(left == right for left, right in zip(base.best_tokens, other.best_tokens, strict=True))
    return same / base.tokens


def kl_divergence(base: Quality | None, other: Quality | None) -> float | None:
    """The mean over positions of the KL divergence D(P || Q) in nats, with P the base's and Q the other's distribution
    of the next token.

    Only the most likely tokens of both are known at each position. With one cell for each token that both have, and one
    for all others, D = sum over cells of P log(P / Q) is a lower bound of the divergence over single tokens, by the log
    sum inequality (Cover and Thomas, Elements of Information Theory, theorem 2.7.1), and close to it if the cells of
    single tokens have nearly all of P. None for other texts or windows, and for records without the necessary values.
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
    """The log-likelihoods of the most likely tokens at each position."""
    pairs = zip(quality.likeliest, quality.log_likelihoods, strict=True)
    return [dict(zip(tokens, values, strict=True)) for tokens, values in pairs]


def _rest(place: dict[int, float], shared: Set[int]) -> float:
    """The log-likelihood of all tokens other than the shared ones."""
    return math.log(max(LEAST_MASS, 1 - sum(math.exp(place[token]) for token in shared)))
