"""A server with the protocols of endpoints that can misbehave: the first part of the path selects how.

    http://127.0.0.1:PORT/drop_token/v1/completions         without that part it behaves correctly

Its answers count upwards from the last token of the prompt, like those of the dummy engine. `python fake_server.py PORT
STEP_S` serves until it is ended; `FakeServer()` serves in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Self

VOCAB_SIZE = 256
JUNK_BYTES = 1 << 30
SLOW_METRICS_S = 0.6


@dataclass
class Seen:
    """One received request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Responder:
    """Writes one response to a connection, in pieces."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    def head(self, status: str = "200 OK", kind: str = "text/event-stream") -> None:
        self.writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())

    def piece(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, value: Any) -> None:
        self.piece(b"data: " + json.dumps(value).encode() + b"\n\n")

    def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")

    def whole(self, status: str, value: Any) -> None:
        self.head(status, "application/json")
        self.piece(json.dumps(value).encode())
        self.end()


def choice(ids: list[int], reason: str | None = None) -> dict[str, Any]:
    text = "".join(f" {token}" for token in ids)
    return {"id": "cmpl-0", "object": "text_completion", "model": "fake", "choices": [
        {"index": 0, "text": text, "finish_reason": reason, "token_ids": ids},
    ]}  # fmt: skip


def usage(prompt: int, new: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}}


@dataclass
class FakeServer:
    """The server. `step_s` is the time between the tokens of an answer; `seen` has the requests so far."""

    port: int = 0
    step_s: float = 0.0
    certificate: tuple[str, str] | None = None
    wait_for: int = 0
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    open_now: int = 0
    most_open: int = 0

    def __enter__(self) -> Self:
        started = threading.Event()
        self.loop = asyncio.new_event_loop()

        async def serve() -> None:
            self.server = await self.start()
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(serve())
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        def stop() -> None:
            self.server.close()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_soon(self.loop.stop)

        self.loop.call_soon_threadsafe(stop)
        self.thread.join(10)

    async def start(self) -> asyncio.Server:
        tls = None
        if self.certificate:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(*self.certificate)
        server = await asyncio.start_server(self.connection, "127.0.0.1", self.port, ssl=tls, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def url(self, behaviour: str = "ok") -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}/{behaviour}"

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while request := await read_request(reader):
                self.seen.append(request)
                self.open_now += 1
                self.most_open = max(self.most_open, self.open_now)
                try:
                    keep = await self.respond(request, Responder(writer))
                finally:
                    self.open_now -= 1
                await writer.drain()
                if not keep:
                    break
        writer.close()

    async def respond(self, request: Seen, out: Responder) -> bool:
        """Answer one request. True if the connection stays open."""
        behaviour, _, path = request.path.strip("/").partition("/")
        if behaviour in ("v1", "generate_stream", "metrics", "info", "version"):  # the path selects no behaviour
            behaviour, path = "ok", request.path.strip("/")
        if path == "v1/models":
            out.whole("200 OK", {"object": "list", "data": [{"id": "fake", "owned_by": "vllm"}]})
            return True
        if behaviour == "slow_metrics" and path == "metrics":
            await asyncio.sleep(SLOW_METRICS_S)
        if path not in ("v1/completions", "generate_stream"):
            out.whole("404 Not Found", {"detail": "Not Found"})
            return True
        return await getattr(self, behaviour)(request, out) is not False

    async def stream(
        self, ids: list[int], prompt: int, out: Responder, group: int = 1, most: int | None = None
    ) -> None:
        """A correct answer, of which at most `most` tokens are sent."""
        out.head()
        sent = ids[:most]
        for place in range(0, len(sent), group):
            last = place + group >= len(sent)
            out.event(choice(sent[place : place + group], "length" if last else None))
            if self.step_s:
                await asyncio.sleep(self.step_s)
        out.event(usage(prompt, len(ids)))
        out.piece(b"data: [DONE]\n\n")
        out.end()

    async def ok(self, request: Seen, out: Responder) -> None:
        await self.stream(answer(request), prompt_length(request), out)

    async def slow_metrics(self, request: Seen, out: Responder) -> None:
        await self.ok(request, out)

    async def timed(self, request: Seen, out: Responder) -> None:
        """All streams send at the same times, and the text of each event is the time at which it was sent."""
        out.head()
        for step, token in enumerate(answer(request)):
            now = perf_counter()
            await asyncio.sleep(self.step_s - now % self.step_s)
            event = choice([token], None if step + 1 < request.body["max_tokens"] else "length")
            event["choices"][0]["text"] = f" {perf_counter():.7f}"
            out.event(event)
        out.event(usage(prompt_length(request), request.body["max_tokens"]))
        out.piece(b"data: [DONE]\n\n")
        out.end()

    async def together(self, request: Seen, out: Responder) -> None:
        """Answers no request before `wait_for` of them were open at once."""
        while self.most_open < self.wait_for:
            await asyncio.sleep(0.01)
        await self.ok(request, out)

    async def two_at_once(self, request: Seen, out: Responder) -> None:
        await self.stream(answer(request), prompt_length(request), out, group=2)

    async def drop_token(self, request: Seen, out: Responder) -> None:
        await self.stream(answer(request), prompt_length(request), out, most=-1)

    async def one_more(self, request: Seen, out: Responder) -> None:
        ids = answer(request)
        await self.stream([*ids, 7], prompt_length(request), out)

    async def other_prompt(self, request: Seen, out: Responder) -> None:
        await self.stream(answer(request), prompt_length(request) + 1, out)

    async def error_under_200(self, request: Seen, out: Responder) -> None:
        out.head()
        out.event(choice(answer(request)[:1]))
        out.event({"error": {"message": "the engine died", "code": 500}})
        out.end()

    async def aborts(self, request: Seen, out: Responder) -> None:
        out.head()
        out.event(choice(answer(request)[:1], "abort"))
        out.piece(b"data: [DONE]\n\n")
        out.end()

    async def stalls(self, request: Seen, out: Responder) -> None:
        out.head()
        out.event(choice(answer(request)[:1]))
        await asyncio.Event().wait()

    async def mute(self, request: Seen, out: Responder) -> None:
        await asyncio.Event().wait()

    async def pings(self, request: Seen, out: Responder) -> None:
        out.head()
        while True:
            out.piece(b": ping\n\n")
            await out.writer.drain()
            await asyncio.sleep(0.02)

    async def closes(self, request: Seen, out: Responder) -> bool:
        out.head()
        out.event(choice(answer(request)[:1]))
        await out.writer.drain()
        return False

    async def closes_at_once(self, request: Seen, out: Responder) -> bool:
        return False

    async def no_done(self, request: Seen, out: Responder) -> None:
        out.head()
        out.event(choice(answer(request), "length"))
        out.end()

    async def no_end(self, request: Seen, out: Responder) -> None:
        out.head()
        out.event(choice(answer(request)))
        out.piece(b"data: [DONE]\n\n")
        out.end()

    async def half_an_event(self, request: Seen, out: Responder) -> None:
        out.head()
        out.piece(b'data: {"choices": [{"text": "a", "token_ids": [1], "fin\n\n')
        out.end()

    async def wrong_types(self, request: Seen, out: Responder) -> None:
        out.head()
        out.event({"choices": [{"text": ["a"], "token_ids": ["1"]}]})
        out.end()

    async def a_list(self, request: Seen, out: Responder) -> None:
        out.head()
        out.piece(b"data: [1, 2]\n\n")
        out.end()

    async def empty(self, request: Seen, out: Responder) -> None:
        out.head()
        out.end()

    async def busy(self, request: Seen, out: Responder) -> None:
        out.whole("429 Too Many Requests", {"error": {"message": f"not you, {request.headers.get('authorization')}"}})

    async def some_busy(self, request: Seen, out: Responder) -> None:
        if request.body["prompt"][-1] % 3 == 0:
            await self.busy(request, out)
        else:
            await self.ok(request, out)

    async def busy_once(self, request: Seen, out: Responder) -> None:
        if sum(one.body == request.body for one in self.seen) == 1:
            await self.busy(request, out)
        else:
            await self.ok(request, out)

    async def breaks(self, request: Seen, out: Responder) -> None:
        out.whole("500 Internal Server Error", {"detail": "a" * 10_000})

    async def breaks_later(self, request: Seen, out: Responder) -> None:
        """Like a server that answers health checks (requests for one token) but fails on all others."""
        await (self.ok if request.body["max_tokens"] == 1 else self.breaks)(request, out)

    async def redirects(self, request: Seen, out: Responder) -> None:
        out.whole("307 Temporary Redirect", {})

    async def junk(self, request: Seen, out: Responder) -> None:
        out.head()
        block = b"j" * (1 << 16)
        for _ in range(JUNK_BYTES // len(block)):
            out.piece(block)
            await out.writer.drain()

    async def no_http(self, request: Seen, out: Responder) -> bool:
        out.writer.write(b"SSH-2.0-OpenSSH_9.2\r\n" * 10)
        await out.writer.drain()
        return False

    async def never_ends(self, request: Seen, out: Responder) -> None:
        out.head()
        token = 0
        while True:
            out.event(choice([token % VOCAB_SIZE]))
            await out.writer.drain()
            token += 1


async def read_request(reader: asyncio.StreamReader) -> Seen | None:
    """The next request of a connection; None at its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(first.split()[1], headers, json.loads(body) if body else {})


def prompt_length(request: Seen) -> int:
    return len(request.body["prompt"])


def answer(request: Seen) -> list[int]:
    prompt = request.body["prompt"]
    last = len(prompt) if isinstance(prompt, str) else prompt[-1]
    return [(last + step) % VOCAB_SIZE for step in range(1, request.body["max_tokens"] + 1)]


async def main(port: int, step_s: float) -> None:
    server = await FakeServer(port, step_s).start()
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
