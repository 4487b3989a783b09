"""Parts of a configuration for servers: arrivals of requests, objectives for their latency, the server to start."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadConfig:
    """When prompts arrive, for an engine with its own scheduler; all at once by default.

    Closed loop: `concurrency` prompts are being answered at any time. Open loop: prompts arrive at `request_rate`, or
    at the times of the prompt set, regardless of earlier ones.
    """

    concurrency: int | None = None
    request_rate: float | None = None  # prompts per second; a Poisson process drawn from the seed
    arrivals: bool = False  # use the "arrival_s" fields of the prompt file

    @property
    def is_set(self) -> bool:
        return self.is_open or self.concurrency is not None

    @property
    def is_open(self) -> bool:
        return self.arrivals or self.request_rate is not None


@dataclass
class SloConfig:
    """The latency limits of a good request, in seconds; None is no limit."""

    ttft: float | None = None  # time to first token
    tpot: float | None = None  # time per output token after the first
    e2el: float | None = None  # end-to-end latency: time to the last token

    @property
    def is_set(self) -> bool:
        return self.ttft is not None or self.tpot is not None or self.e2el is not None


@dataclass
class ServerConfig:
    """A server that is started for the run and stopped at its end.

    `command` is a shell-like command line with placeholders in braces, whose names `launcher.backends.endpoint`
    defines; `arguments` are appended unchanged. Settings that begin with `cpu_` are added if the run does not use CUDA.
    `after` is a command that runs after the server has ended.
    """

    name: str = "none"
    command: str = ""
    arguments: list[str] = field(default_factory=list)
    cpu_arguments: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    cpu_environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # interpreter that runs the server
    dialect: str = "auto"
    after: str = ""
    ready_timeout_s: float = 900.0
