"""The figures of speculative decoding: accepted draft tokens, tokens per row and step, and the time spent on
drafting."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from launcher.results.figures.summaries import spread
from launcher.results.measured import Speculation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.results.measured import Repeat

GUESSED, ACCEPTED, GUESSING = "guessed_tokens", "accepted_guesses", "guessing_s"
COUNTED = {
    GUESSED: "guessed tokens",
    ACCEPTED: "guessed tokens that were accepted",
    GUESSING: "seconds of guessing",
}
"""The counters of speculative decoding, with their labels; not every engine reports the drafting time."""


def speculates(ranks: Sequence[Repeat]) -> bool:
    """True if draft tokens were proposed."""
    return any(GUESSED in rank.counters for rank in ranks)


def rows_of(rank: Repeat) -> Iterator[int]:
    """The context length, in tokens including the prompt, of each row in each decode step of a rank.

    Tokens of one step have the same time, so an inter-token time of 0 does not begin a new step.
    """
    gaps = iter(rank.itl_s)
    for prompt, new in rank.lengths:
        for number, gap in enumerate(islice(gaps, new - 1), 1):
            if gap != 0:
                yield prompt + number


def speculation_of(repeats: Sequence[Sequence[Repeat]]) -> Speculation | None:
    """The figures over some repeats, each from its ranks; None without draft tokens."""
    if not any(map(speculates, repeats)):
        return None
    counted = [
        {name: sum(rank.counters.get(name, 0) for rank in ranks) for name in (GUESSED, ACCEPTED, GUESSING)}
        for ranks in repeats
    ]
    rows = [sum(1 for rank in ranks for _ in rows_of(rank)) for ranks in repeats]
    tokens = [sum(new - 1 for rank in ranks for _, new in rank.lengths) for ranks in repeats]
    decode = [sum(rank.decode_s or 0 for rank in ranks) for ranks in repeats]
    guessing = [sums[GUESSING] for sums in counted]
    return Speculation(
        acceptance=spread(_share(sums[ACCEPTED], sums[GUESSED]) for sums in counted),
        tokens_per_step=spread(map(_share, tokens, rows)),
        guessing=spread(_share(seconds, whole) or None for seconds, whole in zip(guessing, decode, strict=True)),
    )


def _share(part: float, whole: float) -> float | None:
    if whole:
        return part / whole
    return None
