"""The protocols of servers: the body of a request, and the meaning of its events."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from launcher.backends.base import Prompt
    from launcher.config.schema import SamplingConfig
    from shards.untrusted_files import JsonObject

FinishReason = Literal["stop", "length"]
FINISHED: dict[str, FinishReason] = {
    "stop": "stop", "length": "length", "eos_token": "stop", "stop_sequence": "stop",
}  # fmt: skip
"""Finish reasons by the names that servers use; any other name means that the server aborted the answer."""


class MalformedError(ValueError):
    """An event that the dialect does not allow."""


class ServerError(Exception):
    """An event by which the server reports a failure."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The part of an answer in one event. Token ids are None if the server sends none."""

    text: str = ""
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_ids: tuple[int, ...] | None = None
    is_piece: bool = False  # has a part of the answer, not only a finish reason or token counts


@dataclass(frozen=True, slots=True)
class Dialect(ABC):
    """One protocol.

    `takes_ids`: prompts are sent as token ids. `gives_ids`: answers contain token ids. `ignores_eos`: the server
    supports generation past EOS. `ends_with_done`: the last event is followed by [DONE].
    """

    path: str
    takes_ids: bool
    gives_ids: bool
    ignores_eos: bool
    ends_with_done: bool

    @abstractmethod
    def body(self, model: str, prompt: Prompt, sampling: SamplingConfig, seed: int, salt: str) -> JsonObject:
        """The request for a streamed answer; `salt` keeps the server from using its cache of earlier requests."""

    @abstractmethod
    def read(self, event: Any) -> Delta:
        """Parse an event; MalformedError if it does not belong to this dialect, ServerError if it reports an error."""


@dataclass(frozen=True, slots=True)
class Completions(Dialect):
    """OpenAI's /v1/completions, with only the fields of its reference: text in, text out."""

    path: str = "/v1/completions"
    takes_ids: bool = False
    gives_ids: bool = False
    ignores_eos: bool = False
    ends_with_done: bool = True

    def body(self, model: str, prompt: Prompt, sampling: SamplingConfig, seed: int, salt: str) -> JsonObject:
        return {
            "model": model,
            "prompt": prompt.text,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed + prompt.index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, event: Any) -> Delta:
        _raise_error(event)
        choices = _of(event, "choices", list, [])
        usage = _of(event, "usage", dict, {})
        prompt, completion = _of(usage, "prompt_tokens", int, None), _of(usage, "completion_tokens", int, None)
        if not choices:
            return Delta(prompt_tokens=prompt, completion_tokens=completion)
        choice = choices[0]
        ids = None
        if self.gives_ids:
            ids = _ids(choice, "token_ids")
        text, reason = _of(choice, "text", str, ""), _of(choice, "finish_reason", str, None)
        is_piece = bool(ids or text or (ids is None and reason is None))
        return Delta(text, ids, reason, prompt, completion, _ids(choice, "prompt_token_ids") or None, is_piece)


@dataclass(frozen=True, slots=True)
class TokenCompletions(Completions):
    """/v1/completions of vLLM, SGLang and Ray Serve: token ids in and out. `no_top_k` is the value that turns top_k
    off."""

    takes_ids: bool = True
    gives_ids: bool = True
    ignores_eos: bool = True
    no_top_k: int = -1

    def body(self, model: str, prompt: Prompt, sampling: SamplingConfig, seed: int, salt: str) -> JsonObject:
        body = Completions.body(self, model, prompt, sampling, seed, salt)
        if self.takes_ids:
            body["prompt"] = list(prompt.token_ids)
        return body | {
            "top_k": sampling.top_k or self.no_top_k,
            "min_p": 0.0,  # set, since a server may take defaults from the model's generation_config.json
            "repetition_penalty": 1.0,
            "ignore_eos": sampling.ignore_eos,
            "return_token_ids": True,
            "cache_salt": salt,
        }


@dataclass(frozen=True, slots=True)
class TransformersCompletions(Completions):
    """/v1/completions of `transformers serve`, which refuses unknown fields and seeds its process only once."""

    ignores_eos: bool = True
    ends_with_done: bool = False

    def body(self, model: str, prompt: Prompt, sampling: SamplingConfig, seed: int, salt: str) -> JsonObject:
        asked: JsonObject = {"model": model, "prompt": prompt.text, "max_tokens": sampling.max_new_tokens}
        asked |= {"temperature": sampling.temperature, "stream": True}
        wanted: JsonObject = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            wanted |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.ignore_eos:
            wanted["eos_token_id"] = -1
        if sampling.temperature > 0 or sampling.ignore_eos:  # it replaces the model's own, including its EOS
            asked["generation_config"] = json.dumps(wanted)
        return asked


@dataclass(frozen=True, slots=True)
class GenerateStream(Dialect):
    """/generate_stream of Text Generation Inference: text in; each event has a token with its id."""

    path: str = "/generate_stream"
    takes_ids: bool = False
    gives_ids: bool = True
    ignores_eos: bool = False
    ends_with_done: bool = False

    def body(self, model: str, prompt: Prompt, sampling: SamplingConfig, seed: int, salt: str) -> JsonObject:
        wanted: JsonObject = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "details": True,
            "return_full_text": False,
        }
        if sampling.temperature > 0:
            wanted |= {"temperature": sampling.temperature, "seed": seed + prompt.index}
            if sampling.top_p < 1:
                wanted["top_p"] = sampling.top_p
            if sampling.top_k:
                wanted["top_k"] = sampling.top_k
        return {"inputs": prompt.text, "parameters": wanted}

    def read(self, event: Any) -> Delta:
        _raise_error(event)
        token = _of(event, "token", dict, None)
        details = _of(event, "details", dict, {})
        text = _of(token, "text", str, "")
        if _of(token, "special", bool, False):
            text = ""
        return Delta(
            text=text,
            token_ids=_ids({"ids": [_of(token, "id", int, None)]}, "ids"),
            finish_reason=_of(details, "finish_reason", str, None),
            prompt_tokens=_of(details, "input_length", int, None),
            completion_tokens=_of(details, "generated_tokens", int, None),
            is_piece=True,
        )


DIALECTS: dict[str, Dialect] = {
    "openai": Completions(),
    "vllm": TokenCompletions(),
    "sglang": TokenCompletions(),
    "transformers": TransformersCompletions(),
    "tgi": GenerateStream(),
}


def _raise_error(event: Any) -> None:
    """ServerError if an event contains an error, as a text or as an object with a message."""
    if not isinstance(event, dict) or event.get("error") is None:
        return
    error = event["error"]
    if isinstance(error, dict):
        error = error.get("message", error)
    raise ServerError(str(error))


def _of(part: Any, key: str, kind: type, default: Any) -> Any:
    """An entry of an object; the default if it is absent or null, MalformedError if it has another type."""
    if not isinstance(part, dict):
        raise MalformedError(f"{json.dumps(part)[:80]} is no object")
    value = part.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MalformedError(f"{key} is {json.dumps(value)[:80]}")
    return value


def _ids(part: Any, key: str) -> tuple[int, ...]:
    ids = _of(part, key, list, [])
    if not all(type(item) is int for item in ids):
        raise MalformedError(f"{key} is {json.dumps(ids)[:80]}")
    return tuple(ids)
