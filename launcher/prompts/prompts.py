"""Prompt sets as token ids, encoded once for each run, so that every engine gets the same ids."""

from __future__ import annotations

import importlib
import json
import random
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from launcher.backends.base import Prompt
from launcher.composition.quoting import for_shell
from launcher.config.options import MOST_PROMPTS
from launcher.config.schema import ConfigError
from launcher.prompts.files import read_adapters, read_arrivals, read_file
from launcher.system import typed
from shards.errors import CheckpointError
from shards.untrusted_files import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from launcher.config.schema import PromptsConfig, RunConfig, SamplingConfig

MAX_PROMPT_BYTES = 2 << 20  # half a million tokens; a tokenizer takes 200 bytes of memory per byte of text


def load_prompts(config: RunConfig, folder: Path | None, vocab_size: int) -> list[Prompt]:
    """The prompts of a run as token ids of the model in `folder`; for random weights `folder` may be None."""
    wanted = config.prompts
    if wanted.input_tokens is not None:
        assert wanted.count is not None, "what composed says how many"
        return synthetic_prompts(wanted.count, wanted.input_tokens, vocab_size, config.seed, wanted.shared_tokens or 0)
    texts = read_texts(wanted)
    if folder is None:
        raise ConfigError(
            f"{config.model.path} is not on this machine: random weights can be made, but texts need its tokenizer.",
            "prompts=synthetic",
        )
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer.json.",
            "prompts=synthetic, which needs none; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one",
        )
    if wanted.chat:
        texts = importlib.import_module("launcher.prompts.chat").chats(texts, wanted.system, folder)
    prompts = encode(texts, folder, adds_special_tokens=not wanted.chat)
    if names := config.adapter.paths:
        chosen = read_adapters(wanted, names)
        prompts = [replace(prompt, adapter=name) for prompt, name in zip(prompts, chosen, strict=True)]
    if not config.load.arrivals:
        return prompts
    return [replace(prompt, arrival_s=moment) for prompt, moment in zip(prompts, read_arrivals(wanted), strict=True)]


def has_tokenizer(folder: Path) -> bool:
    """True if a model's folder has a tokenizer.json."""
    return (folder / "tokenizer.json").is_file()


def is_text_without_tokenizer(config: RunConfig, folder: Path | None) -> bool:
    """True if the prompts are texts, but the model's folder has no tokenizer."""
    return config.prompts.input_tokens is None and (folder is None or not has_tokenizer(folder))


def guessed_prompts(config: RunConfig, vocab_size: int) -> list[Prompt]:
    """Prompts of approximately the right lengths, for a plan without the model's tokenizer: one token per 4 bytes."""
    wanted = config.prompts
    if wanted.input_tokens is not None:
        return load_prompts(config, None, vocab_size)
    texts = read_texts(wanted)
    return [Prompt(index, text, (0,) * -(-len(text.encode()) // 4)) for index, text in enumerate(texts)]


def read_texts(source: PromptsConfig) -> list[str]:
    """The texts of a prompt preset; ConfigError for a file that is missing, empty or malformed, with the line."""
    if source.texts is not None:
        texts = list(source.texts)
    elif source.path is None:
        raise ConfigError(f"prompts={source.name} needs a file.", "prompts.path=questions.txt")
    else:
        texts = read_file(source)
    if not texts:
        if source.path is None:
            hint = for_shell("prompts.texts=[Hello]")
        else:
            hint = f"a prompt in {source.path}, or prompts=seed prompts.path=null"
        raise ConfigError(f"The prompt set is empty ({source.path or source.name}).", hint)
    if len(texts) > MOST_PROMPTS:
        raise ConfigError(f"There are {len(texts):,} prompts, more than {MOST_PROMPTS:,}.", f"the first {MOST_PROMPTS}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(
                f"Prompt {index} is {str(text)[:80]}, not a text.", for_shell("prompts.texts=['a text','another']")
            )
        if len(text) > MAX_PROMPT_BYTES:
            fact = f"Prompt {index} has {len(text):,} letters, more than {MAX_PROMPT_BYTES:,}."
            raise ConfigError(fact, "a shorter prompt, or prompts of a line each")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # from JSON escapes, or bytes that are not UTF-8
            raise ConfigError(f"Prompt {index} has an unpaired surrogate, which is not a character.", "leave it out")
    return texts


def encode(texts: Sequence[str], folder: Path, adds_special_tokens: bool = True) -> list[Prompt]:
    """Encode texts with the model's tokenizer.json; `adds_special_tokens` is False for texts from a chat template."""
    tokenizer = _tokenizer(folder)
    prompts = [
        Prompt(index, text, tuple(tokenizer.encode(text, add_special_tokens=adds_special_tokens).ids))
        for index, text in enumerate(texts)
    ]
    if empty := next((prompt for prompt in prompts if not prompt.token_ids), None):
        raise ConfigError(f"Prompt {empty.index} ({empty.text!r}) has no tokens.", "leave it out")
    return prompts


def decode(completions: Sequence[Sequence[int]], folder: Path | None) -> list[str]:
    """Decode token ids to texts, without special tokens; empty texts if the model has no tokenizer."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return ["" for _ in completions]
    tokenizer = _tokenizer(folder)
    return [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in completions]


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise CheckpointError(
            f"Cannot read {folder / 'tokenizer.json'}: {error}.", "download the model again"
        ) from None


def synthetic_prompts(count: int, length: int, vocab_size: int, seed: int, shared: int = 0) -> list[Prompt]:
    """`count` prompts of exactly `length` random token ids, of which the first `shared` are common to all.

    They are the same on every machine for a given seed.
    """
    draw = random.Random(seed)
    prefix = tuple(draw.randrange(vocab_size) for _ in range(shared))
    rest = length - shared
    return [Prompt(index, "", (*prefix, *(draw.randrange(vocab_size) for _ in range(rest)))) for index in range(count)]


def sampling_of(config: RunConfig) -> SamplingConfig:
    """The sampling of the run; with `prompts.output_tokens` the number of new tokens is fixed, and EOS ignored."""
    if config.prompts.output_tokens is None:
        return config.sampling
    return replace(config.sampling, max_new_tokens=config.prompts.output_tokens, ignore_eos=True)


def check_context(config: RunConfig, prompts: Sequence[Prompt], context: int | None) -> int:
    """The largest number of tokens of a prompt and its answer together; ConfigError if the model's context is
    shorter."""
    key, new_tokens = "prompts.output_tokens", config.prompts.output_tokens
    if new_tokens is None:
        key, new_tokens = "sampling.max_new_tokens", config.sampling.max_new_tokens
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length, needed = len(longest.token_ids), len(longest.token_ids) + new_tokens
    if context is None or needed <= context:
        return needed
    if length < context:
        hint = f"{key}={context - length}, or a shorter prompt"
    elif longest.text or new_tokens >= context:
        hint = f"a prompt of at most {max(context - new_tokens, 1)} tokens"
    else:
        hint = f"prompts.input_tokens={context - new_tokens}"
    raise ConfigError(
        f"Prompt {longest.index} has {length} tokens; with {new_tokens} new ones that is {needed}, "
        f"and the context of the model is {context}.",
        hint,
    )


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSON lines, with all of their fields."""
    path.write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts), encoding="utf-8")


def read_prompts(path: Path) -> list[Prompt]:
    """The inverse of `write_prompts`."""
    return [typed.decode(row, Prompt) for row in read_json_lines(path, ConfigError, "run it again")]
