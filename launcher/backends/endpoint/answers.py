"""An exchange with a server -> the answer to a prompt, or its failure."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from launcher.backends.endpoint.dialects import FINISHED, MalformedError, ServerError
from launcher.backends.endpoint.transport.events import events
from launcher.backends.endpoint.transport.failures import Failure, one_line

if TYPE_CHECKING:
    from launcher.backends.endpoint.dialects import Delta, Dialect, FinishReason
    from launcher.backends.endpoint.transport.connection import Exchange


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a server to one prompt.

    `pieces_s` are the arrival times of the parts of the answer, in seconds after the request was sent. `new_tokens` is
    the number of token ids, else the number that the server reports, else the number of parts. `prompt_tokens` and
    `prompt_ids` are the tokens of the prompt as the server reports them. With a `failure` the other fields describe
    what arrived before it. With several `attempts`, times are relative to the first.
    """

    text: str = ""
    token_ids: tuple[int, ...] | None = None
    finish_reason: FinishReason | None = None
    pieces_s: tuple[float, ...] = ()
    new_tokens: int = 0
    prompt_tokens: int | None = None
    prompt_ids: tuple[int, ...] | None = None
    failure: Failure | None = None
    attempts: int = 1

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first part."""
        return next(iter(self.pieces_s), None)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """The gaps between the parts; each part is one token unless the server sends several at once."""
        return tuple(later - earlier for earlier, later in pairwise(self.pieces_s))


class Reading:
    """Parses an exchange a few events at a time, so that it does not block the event loop."""

    def __init__(self, exchange: Exchange, dialect: Dialect, max_new_tokens: int) -> None:
        self.exchange, self.dialect, self.max_new_tokens = exchange, dialect, max_new_tokens
        self.failure = exchange.failure
        self.is_done = not dialect.ends_with_done
        self.deltas: list[tuple[float, Delta]] = []
        self.left = events(())
        if exchange.status == 200:
            self.left = events(exchange.pieces)

    def read(self, most: int) -> bool:
        """Parse at most `most` events. True if there may be more. Never raises because of their contents."""
        try:
            for moment, data in islice(self.left, most):
                most -= 1
                if data.strip() == b"[DONE]":
                    self.is_done = True
                else:
                    self.deltas.append((moment - self.exchange.sent_at, self.dialect.read(json.loads(data))))
        except ServerError as error:
            self.failure = Failure("error", one_line(str(error)))
            return False
        except (MalformedError, ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            self.failure = self.failure or Failure("malformed", one_line(str(error)))
            return False
        return most == 0

    def answer(self) -> Answer:
        """The answer parsed so far."""
        deltas = [delta for _, delta in self.deltas]
        pieces = tuple(moment for moment, delta in self.deltas if delta.is_piece)
        # If several events have a field, the last one counts; for prompt_ids the first.
        reason = counted = prompt_tokens = prompt_ids = ids = None
        for delta in deltas:
            if delta.finish_reason is not None:
                reason = delta.finish_reason
            if delta.completion_tokens is not None:
                counted = delta.completion_tokens
            if delta.prompt_tokens is not None:
                prompt_tokens = delta.prompt_tokens
            if delta.prompt_ids is not None and prompt_ids is None:
                prompt_ids = delta.prompt_ids
        new_tokens = len(pieces)
        if self.dialect.gives_ids:
            ids = tuple(token for delta in deltas for token in delta.token_ids or ())
            new_tokens = len(ids)
        elif counted is not None:
            new_tokens = counted
        answer = Answer(
            text="".join(delta.text for delta in deltas),
            token_ids=ids,
            finish_reason=FINISHED.get(reason or ""),
            pieces_s=pieces,
            new_tokens=new_tokens,
            prompt_tokens=prompt_tokens,
            prompt_ids=prompt_ids,
            failure=self.failure,
        )
        if self.failure is not None:
            return answer
        return replace(answer, failure=self._fault(answer, reason, counted))

    def _fault(self, answer: Answer, reason: str | None, counted: int | None) -> Failure | None:
        """What is wrong with a stream that ended without an error; None if nothing is."""
        new, most = answer.new_tokens, self.max_new_tokens
        if reason is None:
            return Failure("incomplete", "the stream ended without a reason")
        if answer.finish_reason is None:
            return Failure("aborted", f"the server ended the answer with {one_line(reason)}")
        if not self.is_done:
            return Failure("incomplete", "the stream ended without its last event")
        if new > most:
            return Failure("too_many_tokens", f"{new} tokens arrived, but {most} were requested")
        if answer.token_ids is not None and counted is not None and counted != new:
            return Failure("tokens_lost", f"{new} tokens arrived, but the server made {counted}")
        if new == 0:
            return Failure("incomplete", "no token came")
        return None
