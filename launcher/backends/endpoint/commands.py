"""The command line of a server, from the text in its configuration."""

from __future__ import annotations

import difflib
import shlex
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.composition.quoting import for_shell
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.config.parts.serving import ServerConfig


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """The command that starts a server, its environment, and the command that is run after it has ended."""

    words: tuple[str, ...]
    environment: dict[str, str]
    after: tuple[str, ...]

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.words)])


def server_command(server: ServerConfig, values: Mapping[str, str], on_cuda: bool) -> ServerCommand:
    """The command of `server=` with `values` in place of the names in braces; ConfigError for an unknown name."""
    if not server.command:
        raise ConfigError(
            f"server={server.name} has no command of its own.",
            for_shell("server.command='python app.py --port {port}'"),
        )
    text, environment = server.command, server.environment
    if not on_cuda:
        text, environment = f"{text} {server.cpu_arguments}", environment | server.cpu_environment
    return ServerCommand(
        (*_filled(text, values, "command"), *server.arguments),
        {name: " ".join(_filled(value, values, f"environment.{name}")) for name, value in environment.items()},
        _filled(server.after, values, "after"),
    )


def _filled(text: str, values: Mapping[str, str], key: str) -> tuple[str, ...]:
    """The words of a command line; a value stays one word, whatever it contains."""
    try:
        words = shlex.split(text)
        names = {name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None}
    except ValueError as error:
        hint = "an even number of each kind of quotes, as in a shell"
        raise ConfigError(f"server.{key} cannot be read: {error}.", hint) from None
    if unknown := sorted(names - values.keys()):
        near = difflib.get_close_matches(unknown[0], values, 1, cutoff=0)
        known = ", ".join(f"{{{name}}}" for name in values)
        raise ConfigError(
            f"server.{key} has {{{unknown[0]}}}, which is not known.", f"{{{near[0]}}}, or another of {known}"
        )
    return tuple(word.format(**values) for word in words)
