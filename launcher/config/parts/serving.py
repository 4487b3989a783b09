"""Parts of a configuration for servers: arrivals of requests, objectives for their latency, the server to start."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadConfig:
    """The arrival of prompts, for an engine with its own scheduler; all at once by default.

    Closed loop: `concurrency` prompts are being answered at any time. Open loop: prompts arrive at `request_rate`, or
    at the times of the prompt set, regardless of earlier ones.
    """

    concurrency: int | None = None
    request_rate: float | None = None  # prompts a second, Poisson by the seed
    arrivals: bool = False  # of a file of prompts that has "arrival_s" beside "prompt"

    @property
    def is_set(self) -> bool:
        return self.is_open or self.concurrency is not None

    @property
    def is_open(self) -> bool:
        return self.arrivals or self.request_rate is not None


@dataclass
class SloConfig:
    """The latency limits of a good request, in seconds; None is no limit."""

    ttft: float | None = None  # to the first token
    tpot: float | None = None  # for each token after it
    e2el: float | None = None  # to the last token

    @property
    def is_set(self) -> bool:
        return self.ttft is not None or self.tpot is not None or self.e2el is not None


@dataclass
class ServerConfig:
    """A server that is started for the run and ended with it.

    `command` is a shell-like command line with names of `launcher.backends.endpoint` in braces; `arguments` are
    appended unchanged. Settings that begin with `cpu_` are added without CUDA. `after` runs after the server has ended.
    """

    name: str = "none"
    command: str = ""
    arguments: list[str] = field(default_factory=list)
    cpu_arguments: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    cpu_environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # interpreter that the server is started with
    dialect: str = "auto"
    after: str = ""
    ready_timeout_s: float = 900.0
