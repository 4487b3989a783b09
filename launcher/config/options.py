"""Dataclass fields for an engine's options with their allowed values: `step_s: float = number(0.0, NOT_NEGATIVE)`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a finite number: from `least` (exclusive if `is_open`) to `most` (inclusive; None: unlimited)."""

    least: int
    most: int | None = None
    is_open: bool = False

    def has(self, value: float) -> bool:
        """True if a value is within the bounds."""
        is_enough = value > self.least or (value == self.least and not self.is_open)
        return math.isfinite(value) and is_enough and (self.most is None or value <= self.most)

    def nearest(self, value: float) -> int:
        """The nearest value within the bounds."""
        if self.most is not None and value > self.most:
            return self.most
        if self.is_open:
            return self.least + 1
        return self.least

    def beside(self, value: float) -> str:
        """The bounds in words, for a value outside them; an upper bound that is only a sanity limit is named only if it
        is exceeded."""
        is_passed = self.most is not None and (self.most < MOST_TIMES or value > self.most)
        if self.is_open and is_passed:
            return f"above {self.least} and at most {self.most}"
        if self.is_open:
            return f"above {self.least}"
        if is_passed:
            return f"from {self.least} to {self.most}"
        return f"of {self.least} or more"


MOST = 2**31 - 1
MOST_BYTES = 2**50
MOST_SECONDS = 10**9
MOST_TOKENS = 10**7
"""The most tokens in all prompts of a set: drawing so many random ids takes three seconds and 400 MB."""

MOST_PROMPTS = 10**5
MOST_TIMES = 10**5

COUNT, NOT_NEGATIVE, SHARE = Bounds(1, MOST), Bounds(0, MOST), Bounds(0, 1, is_open=True)
ANY, SECONDS, TOKENS = Bounds(-MOST_BYTES, MOST_BYTES), Bounds(0, MOST_SECONDS), Bounds(1, MOST_TOKENS)
POSITIVE_SECONDS = Bounds(0, MOST_SECONDS, is_open=True)

BOUND, CHOICES = "bounds", "choices"  # keys in the metadata of a dataclass field


def number(default: float | None, bounds: Bounds) -> Any:
    """A dataclass field for a number within `bounds`; None is not checked."""
    return field(default=default, metadata={BOUND: bounds})


def choice(default: str, *others: str) -> Any:
    """A dataclass field for a text that is `default` or one of `others`."""
    return field(default=default, metadata={CHOICES: (default, *others)})
