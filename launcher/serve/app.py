"""The HTTP side: /v1/completions, whole or as a stream of events, /v1/models, /health and /version."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers.decoders import DecodeStream

from launcher.serve.requests import BadRequestError, Wanted, read_request
from launcher.version import __version__

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request
    from tokenizers import Tokenizer

    from launcher.backends.base import FinishReason
    from shards.untrusted_files import JsonObject

VOCABULARY = "prompt has token ids that the model does not have"


@dataclass(frozen=True, slots=True)
class Part:
    """New tokens of an answer; the last part has the finish reason, or an error."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Engine(Protocol):
    """The interface of the engine behind the server; it runs in its own threads."""

    def submit(self, wanted: Wanted, deliver: Callable[[Part], None]) -> None:
        """Answer a request, and pass its parts to `deliver`, from any thread."""

    @property
    def failure(self) -> str | None:
        """The reason why it no longer answers, None while it does."""


@dataclass(frozen=True, slots=True)
class Service:
    """The application for one engine and model. Without a `tokenizer` prompts are token ids, and texts are empty."""

    engine: Engine
    model: str
    tokenizer: Tokenizer | None
    vocab_size: int
    context: int | None
    backend: str

    def app(self) -> Starlette:
        """The routes."""
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/version", self.version),
            ]
        )

    async def models(self, request: Request) -> Response:
        """The list with the single model."""
        entry = {"id": self.model, "object": "model", "owned_by": "launcher", "max_model_len": self.context}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, request: Request) -> Response:
        """Status 200 while the engine answers."""
        if self.engine.failure:
            return JSONResponse({"status": self.engine.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        """This project's version, and the engine."""
        return JSONResponse({"version": __version__, "engine": self.backend})

    async def completions(self, request: Request) -> Response:
        """Answer a request, as a whole or as a stream."""
        try:
            wanted = read_request(json.loads(await request.body()), self.model, self._encode, self.context)
            if max(wanted.token_ids) >= self.vocab_size:
                raise BadRequestError(VOCABULARY)
        except (ValueError, RecursionError) as error:  # BadRequestError and JSON's own are ValueErrors
            return _error(400, str(error))
        if self.engine.failure is not None:
            return _error(503, self.engine.failure)
        parts = self._answer(wanted)
        about = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        about["model"] = self.model
        if wanted.is_stream:
            return StreamingResponse(self._events(wanted, parts, about), media_type="text/event-stream")
        return await self._whole(wanted, parts, about)

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise BadRequestError("the model has no tokenizer.json: prompts are lists of token ids")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=True).ids
        return ids

    async def _answer(self, wanted: Wanted) -> AsyncIterator[Part]:
        """The parts of an answer as the engine makes them."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Part] = asyncio.Queue()

        def deliver(part: Part) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, part)

        self.engine.submit(wanted, deliver)
        is_last = False
        while not is_last:
            part = await queue.get()
            is_last = part.is_last
            yield part

    async def _events(self, wanted: Wanted, parts: AsyncIterator[Part], about: JsonObject) -> AsyncIterator[str]:
        text, count = _Text(self.tokenizer), 0
        async for part in parts:
            if part.error is not None:
                yield _event({"error": {"message": part.error, "type": "engine_error", "code": 500}})
                return
            choice = _choice(wanted, text.add(part.token_ids), part, is_first=count == 0)
            count += len(part.token_ids)
            yield _event(about | {"choices": [choice]})
        if wanted.with_usage:
            yield _event(about | {"choices": [], "usage": _usage(wanted, count)})
        yield "data: [DONE]\n\n"

    async def _whole(self, wanted: Wanted, parts: AsyncIterator[Part], about: JsonObject) -> Response:
        ids: list[int] = []
        async for part in parts:
            if part.error is not None:
                return _error(500, part.error)
            ids += part.token_ids
        whole = Part(tuple(ids), part.finish_reason)
        choice = _choice(wanted, _Text(self.tokenizer).add(whole.token_ids), whole, is_first=True)
        return JSONResponse(about | {"choices": [choice], "usage": _usage(wanted, len(ids))})


class _Text:
    """Incremental decoding of token ids; empty texts without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token_ids: tuple[int, ...]) -> str:
        """The text that these tokens complete."""
        if self._tokenizer is None:
            return ""
        pieces = [self._stream.step(self._tokenizer, token) for token in token_ids]
        return "".join(piece for piece in pieces if piece)


def _choice(wanted: Wanted, text: str, part: Part, is_first: bool) -> JsonObject:
    choice: JsonObject = {"index": 0, "text": text, "logprobs": None, "finish_reason": part.finish_reason}
    if wanted.with_ids:
        choice["token_ids"] = list(part.token_ids)
    if wanted.with_ids and is_first:
        choice["prompt_token_ids"] = list(wanted.token_ids)
    return choice


def _usage(wanted: Wanted, new_tokens: int) -> dict[str, int]:
    read = len(wanted.token_ids)
    return {"prompt_tokens": read, "completion_tokens": new_tokens, "total_tokens": read + new_tokens}


def _event(value: JsonObject) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error(status: int, message: str) -> Response:
    kind = "engine_error"
    if status == 400:
        kind = "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)
