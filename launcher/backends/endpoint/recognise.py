"""Recognise a server: its dialect, the name of its model, and whether its tokenizer agrees with the local one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.backends.base import Prompt
from launcher.backends.endpoint.dialects import DIALECTS
from launcher.backends.endpoint.questions import Questions
from launcher.config.schema import ConfigError, SamplingConfig

if TYPE_CHECKING:
    from launcher.backends.endpoint.answers import Answer
    from launcher.backends.endpoint.transport.client import Client
    from shards.untrusted_files import JsonObject

TRIED = ("vllm", "openai", "transformers")  # the dialect with the most request fields first
TRIAL, ONE_TOKEN = Prompt(0, "The", (1,)), SamplingConfig(max_new_tokens=1)


@dataclass(frozen=True, slots=True)
class Server:
    """A recognised server. `software` is what it reports about itself, the engine first."""

    dialect: str
    model: str
    software: str | None


async def recognise(client: Client, dialect: str, model: str | None, path: str) -> Server:
    """Ask a server for its software and for one token; ConfigError if it does not answer as it should.

    `dialect` may be "auto". `model` is the name of the model on the server, None for the one that it lists; `path` is
    used instead if it lists none or several.
    """
    listed = (await _ask_for(client, "/v1/models")).get("data")
    about = await _ask_for(client, "/info")
    models: list[JsonObject] = []
    if isinstance(listed, list):
        models = [entry for entry in listed if isinstance(entry, dict)]
    owner, served = "", model or str(about.get("model_id", path))
    if models:
        owner = str(models[0].get("owned_by"))
    if len(models) == 1 and not model:
        served = str(models[0].get("id"))
    if dialect != "auto":
        names = [dialect]
    elif owner == "sglang":
        names = ["sglang"]
    elif "docker_label" in about:
        names = ["tgi"]
    else:
        names = list(TRIED)
    for name in names:
        answer = await Questions(client, DIALECTS[name], served, ONE_TOKEN).ask(TRIAL, "trial")
        if answer.failure is None:
            versions = await _ask_for(client, "/version")
            version, software = about.get("version") or versions.get("version") or "", None
            if owner == "launcher":  # launcher.serve, with an engine of this project
                software = f"{versions.get('engine')}, launcher.serve {version}"
            elif owner in ("vllm", "sglang"):
                software = f"{owner} {version}".rstrip()
            elif name in ("tgi", "transformers"):
                software = f"{name} {version}".rstrip()
            return Server(name, served, software)
    assert answer.failure is not None
    hint = f"backend.dialect= one of {', '.join(DIALECTS)}, and backend.served_model= the name that the model has there"
    if models and served not in (listed_names := [str(entry.get("id")) for entry in models]):
        hint = f"backend.served_model={listed_names[0]}"
    fact = f"{client.url} does not answer as {' or '.join(names)}: {answer.failure.kind}, {answer.failure.message}."
    raise ConfigError(fact, hint)


async def _ask_for(client: Client, path: str) -> JsonObject:
    """The JSON object at a path of a server; empty if there is none."""
    exchange = await client.get(path)
    if exchange.failure is not None:
        return {}
    try:
        body = json.loads(exchange.body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(body, dict):
        return body
    return {}


async def check_tokenizer(questions: Questions, prompt: Prompt) -> None:
    """ConfigError if a server tokenizes the text of a prompt differently, as far as it reports that."""
    as_text = replace(questions.dialect, takes_ids=False)
    answer: Answer = await replace(questions, dialect=as_text, sampling=ONE_TOKEN).ask(prompt, "trial")
    ours, theirs = len(prompt.token_ids), answer.prompt_tokens
    if answer.failure is not None or theirs is None:
        return
    fact = f"The server makes {theirs} tokens of prompt {prompt.index}, and the tokenizer here makes"
    hint = "model.path= with the folder or the id of the model that the server has"
    if theirs != ours:
        raise ConfigError(f"{fact} {ours}.", hint)
    if answer.prompt_ids is not None and answer.prompt_ids != prompt.token_ids:
        raise ConfigError(f"{fact} other ones.", hint)
