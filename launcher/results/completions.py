"""Completions on disk: as a rank saves them, and as a run reports them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SavedCompletion:
    """The completion of one prompt as a rank saves it: new token ids, and the gaps of the two largest logits."""

    index: int
    token_ids: tuple[int, ...]
    finish_reason: str
    top2_gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportedCompletion:
    """The completion of one prompt with its texts and lengths: a line of the run's completions, in prompt order."""

    index: int
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    top2_gaps: tuple[float, ...] = ()
