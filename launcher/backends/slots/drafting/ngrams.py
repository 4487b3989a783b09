"""Prompt lookup: what followed the newest tokens of a sequence at their last occurrence. Bookkeeping only, no
tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(slots=True)
class Ngrams:
    """The tokens of a sequence, and for each n-gram of `least` to `most` tokens the position after its last
    occurrence."""

    most: int
    least: int
    tokens: list[int] = field(default_factory=list)
    followed_at: dict[tuple[int, ...], int] = field(default_factory=dict)

    def add(self, new: Iterable[int]) -> None:
        """Append tokens."""
        for token in new:
            here = len(self.tokens)
            for length in range(self.least, min(self.most, here) + 1):
                self.followed_at[tuple(self.tokens[here - length :])] = here
            self.tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that followed the longest matching n-gram; empty without a match."""
        here = len(self.tokens)
        if count == 0:
            return []
        for length in range(min(self.most, here), self.least - 1, -1):
            start = self.followed_at.get(tuple(self.tokens[here - length :]))
            if start is not None:
                known = self.tokens[start : start + count]
                return (known * -(-count // len(known)))[:count]  # assume that a repetition continues
        return []
