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
    """Speculative decoding: where draft tokens come from, and how many one step of the model verifies at once."""

    name: str = NONE
    tokens: int | None = None  # draft tokens per row and step, at most
    ngram_max: int | None = None  # ngram: longest n-gram of newest tokens to look up; tried first
    ngram_min: int | None = None  # ngram: shortest n-gram to look up
    model: str | None = None  # draft: a folder, a hub id, or embedded:NAME

    @property
    def is_on(self) -> bool:
        return self.name != NONE

    @property
    def most(self) -> int:
        """The largest number of draft tokens per row and step; 0 if not set."""
        return self.tokens or 0


def without_others(overrides: Sequence[str]) -> list[str]:
    """The overrides of a command line without keys that only other kinds of speculative decoding use."""
    kind = next((item.partition("=")[2] for item in reversed(overrides) if item.startswith("speculative=")), NONE)
    others = {f"speculative.{key}" for keys in KEYS.values() for key in keys}.difference(
        f"speculative.{key}" for key in KEYS.get(kind, ())
    )
    return [item for item in overrides if item.partition("=")[0] not in others]
