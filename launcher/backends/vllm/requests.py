"""Requests to vLLM: how tokens are chosen, and whether the engine has room for the answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from launcher.backends.base import as_token_ids
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import SamplingConfig


def check_lengths(prompts: Sequence[Prompt], new_tokens: int, room: int) -> None:
    """ConfigError for answers that do not fit: vLLM itself would cut them short silently."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids), default=None)
    if longest is not None and len(longest.token_ids) + new_tokens > room:
        raise ConfigError(
            f"Prompt {longest.index} has {len(longest.token_ids)} tokens; {new_tokens} new ones do not fit into the"
            f" {room} that the engine has room for.",
            f"sampling.max_new_tokens={max(room - len(longest.token_ids), 1)}, or more of backend.max_model_len= "
            "and backend.kv_cache_memory_bytes=",
        )


def sampling_params(prompts: Sequence[Prompt], sampling: SamplingConfig, model: Any, first_seed: int) -> list[Any]:
    """One SamplingParams for each prompt. Its seed depends on the index of the prompt, not on the other prompts.

    `model` is vLLM's configuration of the model.
    """
    vllm = importlib.import_module("vllm")
    eos = model.try_get_generation_config().get("eos_token_id")
    if eos is None:
        eos = getattr(model.hf_config, "eos_token_id", None)
    if sampling.ignore_eos:
        eos = None
    params, seed = [], None
    for prompt in prompts:
        if sampling.temperature > 0:
            seed = first_seed + prompt.index
        params.append(
            vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed,
                ignore_eos=sampling.ignore_eos,
                stop_token_ids=list(as_token_ids(eos)),
                detokenize=False,
            )
        )
    return params
