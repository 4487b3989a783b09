"""Speculative decoding, as a part of a configuration. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NONE, NGRAM, DRAFT = "none", "ngram", "draft"
KEYS = {NONE: (), NGRAM: ("tokens", "ngram_max", "ngram_min"), DRAFT: ("tokens", "model")}
"""The keys that each kind of speculative decoding uses."""


@dataclass
class SpeculativeConfig:
    """Draft tokens, which a step of the model checks all at once."""

    name: str = NONE
    tokens: int | None = None  # the most that are guessed for a row in a step
    ngram_max: int | None = None  # ngram: so many newest tokens are looked up, at first
    ngram_min: int | None = None  # ngram: and no fewer than these
    model: str | None = None  # draft: a folder, a hub id, or embedded:NAME

    @property
    def is_on(self) -> bool:
        return self.name != NONE

    @property
    def most(self) -> int:
        """The most draft tokens of a row in a step."""
        return self.tokens or 0


def without_others(overrides: Sequence[str]) -> list[str]:
    """The overrides of a command line without keys that only other kinds of speculative decoding use."""
    kind = next((item.partition("=")[2] for item in reversed(overrides) if item.startswith("speculative=")), NONE)
    others = {f"speculative.{key}" for keys in KEYS.values() for key in keys}.difference(
        f"speculative.{key}" for key in KEYS.get(kind, ())
    )
    return [item for item in overrides if item.partition("=")[0] not in others]
