"""Prompts sent to one server: requested, parsed, and retried if configured."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.backends.endpoint.answers import Reading
from launcher.backends.endpoint.transport.failures import Failure

if TYPE_CHECKING:
    from launcher.backends.base import Prompt
    from launcher.backends.endpoint.answers import Answer
    from launcher.backends.endpoint.dialects import Dialect
    from launcher.backends.endpoint.transport.client import Client
    from launcher.config.schema import SamplingConfig

READ_AT_ONCE = 32  # events parsed before the event loop serves its connections again
TOKEN_BYTES = 16 * 1024  # bytes of a response per new token, at most
PROMPT_TOKEN_BYTES = 32  # the same per prompt token: some servers return the prompt
OTHER_BYTES = 2**20
RETRY_S = 0.5  # seconds before the second attempt; doubled before each further one


class ServerGoneError(RuntimeError):
    """Nothing listens at the server's address any more."""


@dataclass(frozen=True, slots=True)
class Questions:
    """The settings of requests. `extra` is added to each request; `retries` is how often a failed one is sent again."""

    client: Client
    dialect: Dialect
    model: str
    sampling: SamplingConfig
    seed: int = 0
    retries: int = 0
    extra: dict[str, Any] | None = None

    async def ask(self, prompt: Prompt, salt: str) -> Answer:
        """The server's answer; ServerGoneError if the server has ended."""
        body = self.dialect.body(self.model, prompt, self.sampling, self.seed, salt) | (self.extra or {})
        data = json.dumps(body).encode()
        new_tokens = self.sampling.max_new_tokens
        most = OTHER_BYTES + TOKEN_BYTES * new_tokens + PROMPT_TOKEN_BYTES * len(prompt.token_ids)
        first_sent_at: float | None = None
        for attempt in range(self.retries + 1):
            exchange = await self.client.post(self.dialect.path, data, most)
            if first_sent_at is None:
                first_sent_at = exchange.sent_at
            reading = Reading(replace(exchange, sent_at=first_sent_at), self.dialect, self.sampling.max_new_tokens)
            while reading.read(READ_AT_ONCE):
                await asyncio.sleep(0)
            answer = reading.answer()
            if answer.failure is None:
                break
            message = self.client.public(answer.failure.message)  # the server may have echoed the key
            failure = Failure(answer.failure.kind, message)
            answer = replace(answer, failure=failure)
            if failure.kind in ("unreachable", "closed") and not await self.client.is_listening():
                raise ServerGoneError(f"{self.client.url} has ended: {message}")
            if attempt < self.retries:
                await asyncio.sleep(RETRY_S * 2**attempt)
        return replace(answer, attempts=attempt + 1)
