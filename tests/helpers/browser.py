"""A real headless browser for tests: Chromium through ChromeDriver's HTTP protocol, and a server that logs requests."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def missing() -> str | None:
    """The reason why no browser can be started; None if one can."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(names)} not installed" if names else None


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the files in `folder`: yields the server's address and the list of the requested paths."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    """One window of Chromium."""

    def __init__(self, address: str, session: str) -> None:
        self.base = f"{address}/session/{session}"

    def call(self, path: str, **values: Any) -> Any:
        return _request(f"{self.base}/{path}", values)

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Load a page in a viewport of this size."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)
        self.call("url", url=url)

    def evaluate(self, script: str) -> Any:
        """The value that a script returns."""
        return self.call("execute/sync", script=script, args=[])

    def errors(self) -> list[str]:
        """The messages of the browser console so far."""
        return [entry["message"] for entry in self.call("se/log", type="browser")]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser, which is ended with all its processes on exit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _wait(f"{address}/status", driver)
            options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = _request(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            try:
                yield Browser(address, made["sessionId"])
            finally:
                request = urllib.request.Request(f"{address}/session/{made['sessionId']}", method="DELETE")
                urllib.request.urlopen(request, timeout=30).close()
        finally:
            driver.terminate()
            driver.wait(timeout=30)


def _wait(url: str, driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        assert driver.poll() is None, "chromedriver ended"
        assert time.monotonic() < end, "chromedriver does not answer"
        time.sleep(0.1)


def _request(url: str, values: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(values).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
