"""The body of a request to /v1/completions, converted to a request for the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.config.schema import SamplingConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from shards.untrusted_files import JsonObject

DEFAULT_NEW_TOKENS = 16  # as OpenAI's reference says
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (), "stop": ("", []), "suffix": ("",),
    "repetition_penalty": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "min_p": (0,), "logit_bias": ({},),
}  # fmt: skip
"""Unsupported fields, with the values that have no effect; null never has one."""


class BadRequestError(ValueError):
    """A request that the server refuses."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request: a prompt as token ids, its sampling, and the form of the answer."""

    model: str
    token_ids: tuple[int, ...]
    sampling: SamplingConfig
    is_stream: bool
    with_usage: bool
    with_ids: bool


def read_request(body: Any, model: str, encode: Callable[[str], list[int]], context: int | None) -> Wanted:
    """A checked request for `model`; BadRequestError with one line for mistakes."""
    if not isinstance(body, dict):
        raise BadRequestError("the body is not a JSON object")
    if body.get("model") not in (None, model):
        raise BadRequestError(f"there is no model {body['model']!r}, only {model!r}")
    for name, values in NEUTRAL.items():
        if (value := body.get(name)) is not None and value not in values:
            raise BadRequestError(f"{name}={value!r} is not supported")
    sampling = SamplingConfig(
        max_new_tokens=_number(body, "max_tokens", int, DEFAULT_NEW_TOKENS, 1),
        temperature=_number(body, "temperature", float, 1.0, 0),
        top_p=_number(body, "top_p", float, 1.0, 0),
        top_k=max(_number(body, "top_k", int, 0, -1), 0),
        ignore_eos=_flag(body, "ignore_eos"),
    )
    if sampling.temperature > 0 and body.get("seed") is not None:
        raise BadRequestError("seed is not supported: samples are drawn by the seed of the server")
    if not 0 < sampling.top_p <= 1:
        raise BadRequestError(f"top_p={sampling.top_p!r} is not above 0 and at most 1")
    ids = _prompt_ids(body.get("prompt"), encode)
    if context is not None and len(ids) + sampling.max_new_tokens > context:
        raise BadRequestError(f"{len(ids)} tokens and {sampling.max_new_tokens} new ones are over {context} of context")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequestError("stream_options is not an object")
    is_stream, with_usage = _flag(body, "stream"), _flag(options, "include_usage")
    return Wanted(model, ids, sampling, is_stream, with_usage or not is_stream, _flag(body, "return_token_ids"))


def _prompt_ids(prompt: Any, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """Token ids of a text, or the given ids; a list must contain a single prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        prompt = encode(prompt)
    if not isinstance(prompt, list) or not all(type(item) is int and item >= 0 for item in prompt):
        raise BadRequestError("prompt is neither a text nor a list of token ids")
    if not prompt:
        raise BadRequestError("the prompt has no tokens")
    return tuple(prompt)


def _number(body: JsonObject, name: str, kind: type, default: Any, least: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value != kind(value) or value < least:
        raise BadRequestError(f"{name}={value!r} is not a number of {least} or more")
    return kind(value)


def _flag(body: JsonObject, name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise BadRequestError(f"{name}={value!r} is neither true nor false")
    return bool(value)
