"""The kinds of failed requests, with names by which failures are counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a request has no answer.

    `kind` is one of:
        unreachable   no connection could be made
        closed        the connection ended before the answer did
        not_http      the response is not HTTP
        stalled       no byte arrived for `stall_s`
        timeout       the answer took longer than `timeout_s`
        too_large     the response has more bytes than an answer can have
        http_STATUS   any status but 200, such as http_429
        error         the stream, with status 200, contains an error in place of the rest
        malformed     the stream contains something other than events of the dialect
        incomplete    the stream ended without a finish reason, its last event, or any token
        aborted       the server reports that it aborted the answer
        tokens_lost   fewer or more tokens arrived than the server reports
        too_many_tokens  more tokens arrived than were requested
    `message` is one line.
    """

    kind: str
    message: str


LONGEST_MESSAGE = 300


def one_line(text: str) -> str:
    """Text from a server as one line of limited length."""
    flat = " ".join(text.split())
    if len(flat) <= LONGEST_MESSAGE:
        return flat
    return flat[: LONGEST_MESSAGE - 1] + "…"
