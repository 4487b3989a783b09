"""Completions on disk: as a rank saves them, and as a run reports them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SavedCompletion:
    """The completion of one prompt as a rank saves it: new token ids, and the gaps between the two largest logits.

    A server that returns no ids gives `text` of `num_tokens` tokens. `failure` is the reason if the request failed.
    """

    index: int
    token_ids: tuple[int, ...]
    finish_reason: str
    top2_gaps: tuple[float, ...] = ()
    text: str | None = None
    num_tokens: int | None = None
    failure: str | None = None

    @property
    def answer(self) -> tuple[int, ...] | str:
        """The part that runs are compared by: the tokens, or the text if there are no token ids."""
        if self.text is None:
            return self.token_ids
        return self.text


@dataclass(frozen=True, slots=True)
class ReportedCompletion:
    """The completion of one prompt with texts and lengths: a line of the run's completions, in prompt order.

    A server may return text without token ids. `failure` is the reason if the request failed.
    """

    index: int
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    top2_gaps: tuple[float, ...] = ()
    failure: str | None = None

    @property
    def is_text_only(self) -> bool:
        """True if there are tokens whose ids are not known."""
        return self.new_tokens > len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Saved:
    """The work of earlier attempts: completions in prompt order, and the numbers of complete repeats."""

    completions: tuple[SavedCompletion, ...] = ()
    repeats: tuple[int, ...] = ()
