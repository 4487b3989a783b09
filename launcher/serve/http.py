"""An HTTP application on a port of this machine, in its own thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.applications import Starlette

ADDRESS = "LAUNCHER_SERVE"  # environment variable of the ranks with host:port
START_S = 30.0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError if the address is not available."""
    family = socket.AF_INET
    if ":" in host:
        family = socket.AF_INET6
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OverflowError:
        listening.close()
        raise ConfigError(f"--port={port} is not a port.", "--port=0 takes a free one") from None
    except socket.gaierror as error:
        listening.close()
        raise ConfigError(
            f"--host={host} is not an address of this machine: {error.strerror}.", "--host=0.0.0.0"
        ) from None
    except OSError as error:
        listening.close()
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}.", "--port=0 takes a free one") from None
    return listening


@contextlib.contextmanager
def serving(app: Starlette, listening: socket.socket) -> Iterator[None]:
    """A context in which the application answers requests on a socket."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True, name="http")
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the HTTP server did not start")
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(START_S)
