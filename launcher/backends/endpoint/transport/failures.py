"""The kinds of failed requests, with names by which failures are counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason for a request without an answer.

    `kind` is one of:
        unreachable   no connection could be made
        closed        the connection ended before the answer did
        not_http      what came is no HTTP
        stalled       no byte came for the time that a server may be silent
        timeout       the answer took longer than a request may
        too_large     more bytes came than the answer can have
        http_STATUS   any status but 200, as http_429
        error         the server sent an error in place of the rest, under status 200
        malformed     the stream holds something else than events of the dialect
        incomplete    the stream ended without saying why the answer does
        aborted       the server says that it gave the answer up
        tokens_lost   fewer or more tokens came than the server says it made
        too_many_tokens  more tokens came than were requested
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
