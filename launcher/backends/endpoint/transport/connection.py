"""One HTTP/1.1 connection inside an event loop: requests, and responses with arrival times."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import httptools

from launcher.backends.endpoint.transport.arrivals import ArrivalClock
from launcher.backends.endpoint.transport.failures import Failure

if TYPE_CHECKING:
    import socket

HEAD_BYTES = 64 * 1024  # bytes of the headers of a response, at most


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of a request: seconds in total, and seconds without a byte."""

    timeout_s: float = 600.0
    stall_s: float = 120.0


@dataclass(slots=True)
class Exchange:
    """One request and the body of its response, each piece with its arrival time (on the clock of
    `time.perf_counter`)."""

    sent_at: float
    status: int | None = None
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def body(self) -> bytes:
        """All bytes of the body."""
        return b"".join(piece for _, piece in self.pieces)


class _Response:
    """Callbacks of httptools for one response; `moment` is the arrival time of the bytes that are being parsed."""

    def __init__(self, exchange: Exchange, most_bytes: int) -> None:
        self.exchange, self.bytes_left = exchange, most_bytes + HEAD_BYTES
        self.parser = httptools.HttpResponseParser(self)
        self.moment = self.read_at = exchange.sent_at
        self.has_head = self.has_length = self.has_end = self.keeps_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.has_head = True
        self.exchange.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.exchange.pieces.append((self.moment, body))

    def on_message_complete(self) -> None:
        self.has_end, self.keeps_alive = True, self.parser.should_keep_alive()


class Connection:
    """A connected socket, plain or with TLS. One exchange at a time; `is_open` is True if another one may follow."""

    def __init__(self, connected: socket.socket, tls: ssl.SSLContext | None, host: str) -> None:
        self.socket = connected
        self.is_open = True
        self.idle_since = perf_counter()
        self.clock = ArrivalClock(connected)
        self._loop = asyncio.get_running_loop()
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            self._tls = tls.wrap_bio(self._received, self._to_send, server_hostname=host)
        self._response: _Response | None = None
        self._ended: asyncio.Future[Failure | None] | None = None

    async def begin(self) -> None:
        """Make the TLS handshake, if the connection is to use TLS; OSError if it fails."""
        while self._tls is not None:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_encrypted()
            if not (data := await self._loop.sock_recv(self.socket, HEAD_BYTES)):
                raise ConnectionResetError("the server closed the connection")
            self._received.write(data)
        await self._send_encrypted()
        self._loop.add_reader(self.socket, self._on_readable)

    async def _send_encrypted(self) -> None:
        await self._loop.sock_sendall(self.socket, self._to_send.read())

    async def exchange(self, request: bytes, most_bytes: int, limits: Limits) -> Exchange:
        """Send a request and wait for the end of its response, or for a failure."""
        self._ended = self._loop.create_future()
        self.clock.set()
        exchange = Exchange(perf_counter())
        self._response = _Response(exchange, most_bytes)
        end = self._loop.call_later(
            limits.timeout_s, self._end, Failure("timeout", f"no end in {limits.timeout_s:g} s")
        )
        stall = asyncio.ensure_future(self._watch(limits.stall_s))
        try:
            if self._tls is not None:
                self._tls.write(request)
                await self._send_encrypted()
            else:
                await self._loop.sock_sendall(self.socket, request)
            exchange.failure = await self._ended
        except OSError as error:
            exchange.failure = Failure("closed", str(error))
        finally:
            end.cancel()
            stall.cancel()
            if not self._response.keeps_alive:
                self.close()
            self._response = self._ended = None
            self.idle_since = perf_counter()
        return exchange

    def close(self) -> None:
        """Close the connection."""
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self.socket)
            self.socket.close()

    def _on_readable(self) -> None:
        try:
            moment, data = self.clock.receive()
            if data and self._tls is not None:
                data = self._decrypt(data)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._end(Failure("closed", str(error)))
            return
        if self._response is None:  # no request is open: the server closes the connection, or is out of step
            self.close()
        elif data:
            response = self._response
            response.moment, response.read_at = moment, perf_counter()
            response.bytes_left -= len(data)
            try:
                response.parser.feed_data(data)
            except httptools.HttpParserError as error:
                self._end(Failure("not_http", str(error)))
            if response.has_end:
                self._end(None)
            elif response.bytes_left < 0:
                self._end(Failure("too_large", "more bytes came than an answer can have"))
        elif self._response.has_length or not self._response.has_head:
            self._end(Failure("closed", "the server closed the connection"))
        else:
            self._end(None)  # a response without a length ends with its connection

    def _decrypt(self, data: bytes) -> bytes:
        """Decrypt bytes; empty if they end the connection, SSLWantReadError if more are needed."""
        assert self._tls is not None
        self._received.write(data)
        parts = [self._tls.read(len(data))]
        while parts[-1] and (self._received.pending or self._tls.pending()):
            try:
                parts.append(self._tls.read(len(data)))
            except ssl.SSLWantReadError:
                break
        return b"".join(parts)

    def _end(self, failure: Failure | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(failure)

    async def _watch(self, stall_s: float) -> None:
        """End the exchange if no byte arrives for `stall_s`."""
        assert self._response is not None
        while (left := self._response.read_at + stall_s - perf_counter()) > 0:
            await asyncio.sleep(left)
        self._end(Failure("stalled", f"no byte for {stall_s:g} s"))
