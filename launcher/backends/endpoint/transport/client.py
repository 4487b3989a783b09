"""Requests to one server over persistent connections, and a description of those that fail."""

from __future__ import annotations

import asyncio
import socket
import ssl
from time import perf_counter
from typing import Any, Self
from urllib.parse import urlsplit

from launcher.backends.endpoint.transport.connection import Connection, Exchange, Limits
from launcher.backends.endpoint.transport.failures import Failure, one_line

RENEW_S = 3.0  # a connection idle for longer is not reused: uvicorn closes connections after 5 s without a request
CONNECT_S = 30.0
OTHER_BYTES = 16 * 2**20  # bytes of a response that is not an answer to a prompt, at most


class Client:
    """An HTTP client for one event loop, to be used as a context manager.

    Certificates are verified, with `ca_file` if there is one. It follows no redirects and uses no proxies: it measures
    the server at `url`. `key` is sent in the header of requests, and nowhere else: it is removed from whatever the
    server returns.
    """

    def __init__(self, url: str, limits: Limits, key: str | None = None, ca_file: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.url, self.limits, self._key = url.rstrip("/"), limits, key
        self._host, self._port, self._tls = parts.hostname, parts.port or 80, None
        if parts.scheme == "https":
            self._port, self._tls = parts.port or 443, ssl.create_default_context(cafile=ca_file)
        self._folder = parts.path.rstrip("/")
        self._idle: list[Connection] = []
        self._addresses: list[Any] = []  # results of getaddrinfo
        lines = [
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "Accept: */*",
            "Accept-Encoding: identity",
        ]
        if key:
            lines.append(f"Authorization: Bearer {key}")
        self._headers = "".join(f"{line}\r\n" for line in lines)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the persistent connections."""
        while self._idle:
            self._idle.pop().close()

    async def post(self, path: str, body: bytes, most_bytes: int = OTHER_BYTES) -> Exchange:
        """Send one request and collect the response; a failure is recorded in the exchange, whatever the server
        does."""
        return await self._request("POST", path, body, most_bytes)

    async def get(self, path: str) -> Exchange:
        """Request something other than an answer to a prompt."""
        return await self._request("GET", path, b"", OTHER_BYTES)

    async def _request(self, method: str, path: str, body: bytes, most_bytes: int) -> Exchange:
        head = f"{method} {self._folder}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        begun = perf_counter()
        try:
            connection = self._kept() or await self._connect()
        except OSError as error:
            message = self.public(str(error) or f"no connection in {CONNECT_S:g} s")
            return Exchange(begun, failure=Failure("unreachable", message))
        exchange = await connection.exchange(head.encode() + body, most_bytes, self.limits)
        exchange.sent_at = begun
        if connection.is_open:
            self._idle.append(connection)
        if exchange.status not in (None, 200):
            exchange.failure = Failure(f"http_{exchange.status}", self.public(exchange.body.decode(errors="replace")))
        return exchange

    def _kept(self) -> Connection | None:
        """An open connection that was used recently, if there is one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and perf_counter() - connection.idle_since < RENEW_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        """A new connection, to the address that accepted the last one, or to the first that accepts one; OSError if
        none."""
        loop = asyncio.get_running_loop()
        if not self._addresses:
            self._addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        errors: list[OSError] = []
        for entry in list(self._addresses):
            family, *_, address = entry
            connected = socket.socket(family, socket.SOCK_STREAM)
            try:
                connected.setblocking(False)
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(CONNECT_S):
                    await loop.sock_connect(connected, address)
                    connection = Connection(connected, self._tls, self._host)
                    await connection.begin()
            except BaseException as error:
                connected.close()
                if not isinstance(error, OSError):  # TimeoutError and ssl.SSLError are OSErrors
                    raise
                errors.append(error)
            else:
                self._addresses = [entry]
                return connection
        self._addresses = []
        raise errors[-1]

    def public(self, text: str) -> str:
        """Text from the server or about it, as one line without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        return one_line(text)

    async def is_listening(self) -> bool:
        """True if the server's address accepts connections."""
        try:
            connection = await self._connect()
        except ssl.SSLError:
            return True
        except OSError:
            return False
        connection.close()
        return True
