"""The options of an inference server: its address, or the command that starts one for the run."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from launcher.backends.endpoint.commands import ServerCommand, server_command
from launcher.backends.endpoint.dialects import DIALECTS
from launcher.config.options import POSITIVE_SECONDS, Bounds, choice, number
from launcher.config.schema import BackendConfig, ConfigError
from launcher.models import embedded_folder

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from shards.model.config_fields import TransformersConfig

OTHER_FILES = 256  # open files of a client other than its connections, at most


@dataclass
class EndpointConfig(BackendConfig):
    """Any server with a protocol of `launcher.backends.endpoint.dialects`, called over HTTP."""

    implementation: ClassVar[str] = "launcher.backends.endpoint.backend:EndpointBackend"
    packages: ClassVar[tuple[str, ...]] = ("httptools",)
    pip_extra: ClassVar[str | None] = "endpoint"
    one_process_per_device: ClassVar[bool] = False
    joins_ranks: ClassVar[bool] = False
    continuous_batching: ClassVar[bool] = True
    most_at_once_key: ClassVar[str | None] = "load.concurrency"
    takes_load: ClassVar[bool] = True
    starts_servers: ClassVar[bool] = True

    name: str = "endpoint"
    url: str | None = None  # http://host:port, and a path if the server has its API under one
    dialect: str = choice("auto", *DIALECTS)
    served_model: str | None = None  # the model's name on the server; None: the one that it lists
    key_variable: str | None = None  # environment variable that holds the server's key
    ca_file: str | None = None  # certificates that verify the server; None: those of this machine
    request_timeout_s: float = number(600.0, POSITIVE_SECONDS)  # the longest time for a whole answer
    stall_timeout_s: float = number(120.0, POSITIVE_SECONDS)  # the longest time without a byte
    retries: int = number(0, Bounds(0, 100))  # further attempts of a failed request; its latency includes them
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of each request

    @property
    def uses_devices(self) -> bool:
        return self.url is None

    @property
    def uses_weights(self) -> bool:
        return self.url is None

    def check_here(self) -> None:
        if self.url is not None:
            parts = urlsplit(self.url)
            try:
                is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:
                is_address = False
            if not is_address:
                raise ConfigError(f"backend.url={self.url} is not an address.", "backend.url=http://127.0.0.1:8000")
            if parts.username or parts.query or parts.fragment:
                raise ConfigError(
                    "backend.url contains more than an address, and would be stored in the record.",
                    "backend.key_variable=NAME",
                )
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise ConfigError(f"There is no ${self.key_variable} in the environment.", f"export {self.key_variable}=")

    def settle(self, config: RunConfig, on_cuda: bool) -> tuple[RunConfig, list[str]]:
        """Require exactly one server. The devices behind an address stay unknown."""
        if config.server.name == "none" and self.url is None:
            raise ConfigError("backend=endpoint needs a server.", "backend.url=http://127.0.0.1:8000, or server=vllm")
        if config.server.name != "none" and self.url is not None:
            fact = f"server={config.server.name} starts a server, and backend.url={self.url} has one."
            raise ConfigError(fact, "server=none, or backend.url=null")
        if self.url is None and config.num_nodes > 1:
            raise ConfigError(f"num_nodes={config.num_nodes}, and a server is started on one.", "num_nodes=1")
        if self.url is not None and config.machine is None:
            config = replace(config, devices=1, num_nodes=1)
        return config, []

    def refuse(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool, longest: int) -> None:
        dialect = DIALECTS.get(self.dialect_of(config))
        if dialect is not None and not dialect.takes_ids and config.prompts.input_tokens is not None:
            raise ConfigError(
                f"prompts={config.prompts.name} are token ids, and dialect={self.dialect_of(config)} takes text.",
                "prompts=file prompts.path=questions.txt",
            )
        ignores_eos = config.sampling.ignore_eos or config.prompts.output_tokens is not None
        if dialect is not None and not dialect.ignores_eos and ignores_eos:
            raise ConfigError(
                f"dialect={self.dialect_of(config)} cannot continue after EOS.", "sampling.ignore_eos=false"
            )
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if (config.load.concurrency or 0) > most - OTHER_FILES:
            fact = f"load.concurrency={config.load.concurrency}, and a process may open {most} files."
            raise ConfigError(fact, f"ulimit -n {(config.load.concurrency or 0) + OTHER_FILES}")

    def notes(self, config: RunConfig, on_cuda: bool) -> list[str]:
        if self.url is not None:
            if config.machine is not None:
                return []
            return ["the devices of the server are not known: figures per device are figures of the whole server"]
        return [f"server: {self.command(config, 'PORT', 'MARK', on_cuda)}"]

    def dialect_of(self, config: RunConfig) -> str:
        """The configured dialect; with auto, the dialect of the server that the run starts."""
        if self.dialect == "auto":
            return config.server.dialect
        return self.dialect

    def command(self, config: RunConfig, port: str, mark: str, on_cuda: bool) -> ServerCommand:
        """The command that starts the server of `server=`; ConfigError for options that it does not support."""
        folder = str(embedded_folder(config.model.path, "model.path") or config.model.path)
        device = "cpu"
        if on_cuda:
            device = "cuda"
        values = {
            "python": config.server.python or sys.executable,
            "model": folder,
            "name": config.model.name,
            "port": port,
            "devices": str(config.devices),
            "dtype": config.precision.value,
            "device": device,
            "seed": str(config.seed),
            "mark": mark,
        }
        return server_command(config.server, values, on_cuda)
