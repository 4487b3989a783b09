"""Acceptance of draft tokens, and the token after them: the target's argmax, or a sample from its distribution."""

from __future__ import annotations

import torch


def greedy(best: torch.Tensor, guesses: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept draft tokens that equal the target's argmax. Returns (tokens [rows, 1 + width], number accepted [rows]).

    `best` [rows, 1 + width] is the target's argmax at the newest token and at each of the `guesses` [rows, width], of
    which row r has `counts[r]`. In each row of the result as many tokens are valid as were accepted, plus one.
    """
    holds = guesses == best[:, :-1]
    return best, _leading(holds, counts)


def sampled(
    target: torch.Tensor,
    guesses: torch.Tensor,
    counts: torch.Tensor,
    drafted: torch.Tensor | None,
    uniform: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept draft tokens by rejection sampling, with the same results as `greedy`: the tokens are distributed as if
    each had been drawn from `target` [rows, 1 + width, vocabulary].

    `drafted` [rows, width, vocabulary] are the distributions q that the guesses were drawn from; None if the guesses
    were deterministic. `uniform` [rows, width] is drawn from [0, 1), `noise` [rows, vocabulary] is exponential. A guess
    is accepted with probability min(1, p / q); the first one rejected is replaced by a sample from max(0, p - q).
    """
    rows = torch.arange(len(guesses), device=guesses.device)
    p = target[:, :-1].gather(2, guesses[..., None])[..., 0]
    q = torch.ones_like(p)
    if drafted is not None:
        q = drafted.gather(2, guesses[..., None])[..., 0]
    accepted = _leading(uniform * q < p, counts)
    weights = target[rows, accepted]
    if guesses.shape[1]:
        refused = accepted.clamp(max=guesses.shape[1] - 1)
        if drafted is None:
            taken = torch.zeros_like(weights).scatter_(1, guesses[rows, refused][:, None], 1.0)
        else:
            taken = drafted[rows, refused]
        left = (weights - taken).clamp_(min=0)
        is_refused = (accepted < counts)[:, None] & (left.sum(1, keepdim=True) > 0)
        weights = torch.where(is_refused, left, weights)
    token = (weights / noise).argmax(-1)
    tokens = torch.cat((guesses, token[:, None]), 1).scatter_(1, accepted[:, None], token[:, None])
    return tokens, accepted


def _leading(holds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The number of guesses of each row before the first one that is rejected."""
    is_there = torch.arange(holds.shape[1], device=holds.device) < counts[:, None]
    return (holds & is_there).long().cumprod(1).sum(1)
