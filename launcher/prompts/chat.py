"""Format texts as turns of a chat with the model's chat template."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from launcher.config.schema import ConfigError
from shards.errors import CheckpointError
from shards.untrusted_files import read_bytes, read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shards.untrusted_files import JsonObject

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
DAY = "2026-01-01"
"""The date given to templates that print the current one; fixed, so that prompts do not change from day to day."""


def chats(texts: Sequence[str], system: str | None, folder: Path) -> list[str]:
    """Each text as a user's turn, after the system prompt if there is one, with the prefix of the answer.

    ConfigError if the tokenizer in `folder` has no chat template, or if the template raises an error.
    """
    config: JsonObject = {}
    source: Any
    with contextlib.suppress(FileNotFoundError):
        values = read_json(folder / CONFIG, CheckpointError, "download the model again")
        if isinstance(values, dict):
            config = values
    try:
        source = read_bytes(folder / TEMPLATE).decode()
    except (OSError, UnicodeDecodeError):
        source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise ConfigError(f"prompts.chat=true, and {folder} has no chat template.", "prompts.chat=false")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json  # like transformers, for the same texts
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: DAY
    known = {"tools": None, "documents": None, "add_generation_prompt": True}
    for name, value in config.items():
        if name.endswith("_token"):
            known[name] = value
            if isinstance(value, dict):  # an AddedToken with its text in "content"
                known[name] = value.get("content")
    before, hint = [], "prompts.chat=false"
    if system is not None:
        before, hint = [{"role": "system", "content": system}], "prompts.system=null"
    try:
        template = environment.from_string(source)
        return [template.render(messages=[*before, {"role": "user", "content": text}], **known) for text in texts]
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"The chat template of {folder} refuses: {reason}.", hint) from None


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
