"""A prompt set -> token ids, once for each run, so that every engine is given the same ids."""

from __future__ import annotations

import importlib
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from launcher.backends.base import Prompt
from launcher.config.options import MOST_PROMPTS, MOST_SECONDS
from launcher.config.schema import ConfigError
from launcher.system import typed
from shards.errors import CheckpointError
from shards.untrusted_files import bounded, parse_json, read_bytes, read_json_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.config.schema import PromptsConfig, RunConfig, SamplingConfig

ENCODING = "utf-8-sig"  # Windows' editors begin a file with a mark of their encoding
MAX_PROMPT_BYTES = 2 << 20  # half a million tokens; a tokenizer takes 200 bytes of memory for each of text


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
    if not config.load.arrivals:
        return prompts
    return [replace(prompt, arrival_s=moment) for prompt, moment in zip(prompts, read_arrivals(wanted), strict=True)]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has the file that prompts are encoded by."""
    return (folder / "tokenizer.json").is_file()


def guessed_prompts(config: RunConfig, vocab_size: int) -> list[Prompt]:
    """Prompts of about the right lengths, for a plan without the model's tokenizer: a token for each 4 bytes."""
    wanted = config.prompts
    if wanted.input_tokens is not None:
        return load_prompts(config, None, vocab_size)
    texts = read_texts(wanted)
    return [Prompt(index, text, (0,) * -(-len(text.encode()) // 4)) for index, text in enumerate(texts)]


def read_texts(wanted: PromptsConfig) -> list[str]:
    """The texts of a prompt preset; ConfigError for a file that is missing, empty or malformed, with the line."""
    if wanted.texts is not None:
        texts = list(wanted.texts)
    elif wanted.path is None:
        raise ConfigError(f"prompts={wanted.name} needs a file.", "prompts.path=questions.txt (or .jsonl)")
    else:
        texts = _read_file(Path(wanted.path))
    if not texts:
        raise ConfigError(f"The prompt set is empty ({wanted.path or wanted.name}).", "give at least one prompt")
    if len(texts) > MOST_PROMPTS:
        raise ConfigError(f"There are {len(texts):,} prompts, more than {MOST_PROMPTS:,}.", "a part of them")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"Prompt {index} is {str(text)[:80]}, not a text.", "prompts.texts=['a text','another']")
        if len(text) > MAX_PROMPT_BYTES:
            fact = f"Prompt {index} has {len(text):,} letters, more than {MAX_PROMPT_BYTES:,}."
            raise ConfigError(fact, "a shorter prompt, or prompts of a line each")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # of JSON's escapes, or bytes that are not UTF-8
            raise ConfigError(f"Prompt {index} has half of a surrogate pair, which is no letter.", "leave it out")
    return texts


def _read_file(path: Path) -> list[str]:
    lines = _lines(path)
    if path.suffix == ".jsonl":
        return [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    return [line for line in lines if line.strip()]


def _lines(path: Path) -> list[str]:
    try:
        content = _stdin() if path == Path("-") else read_bytes(path)
        text = content.decode(ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"Cannot read the prompts in {path}: {reason}.", "prompts.path= a UTF-8 file") from None
    return text.split("\n")  # splitlines() also splits at U+2028 in a prompt


def read_arrivals(wanted: PromptsConfig) -> list[float]:
    """The moments at which the prompts of a .jsonl come, in seconds; ConfigError for a set that does not have them."""
    path = Path(wanted.path or "")
    if path.suffix != ".jsonl":
        fact = f"load.arrivals=true, and prompts={wanted.name} says of no prompt when it comes."
        raise ConfigError(fact, 'prompts.path= a .jsonl with {"prompt": "...", "arrival_s": 0.5} a line')
    moments: list[float] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        value = parse_json(line, f"{path}:{number}", ConfigError, "one object a line")
        moment = value.get("arrival_s") if isinstance(value, dict) else None
        earliest = moments[-1] if moments else 0
        if isinstance(moment, bool) or not isinstance(moment, int | float) or not earliest <= moment <= MOST_SECONDS:
            fact = f'{path}:{number} has no "arrival_s" of {earliest:g} or more.'
            raise ConfigError(fact, 'seconds from the start, in order: {"prompt": "...", "arrival_s": 0.5}')
        moments.append(moment)
    return moments


@cache
def _stdin() -> bytes:
    """What is piped in, read once for all points of a sweep."""
    with open(0, "rb", closefd=False) as file:
        return bounded(file, "stdin")


def _prompt_of(line: str, place: str) -> str:
    value = parse_json(line, place, ConfigError, "one object a line")
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise ConfigError(f'{place} has no text under "prompt".', '{"prompt": "The capital of France is"}')
    return text


def encode(texts: Sequence[str], folder: Path, adds_special_tokens: bool = True) -> list[Prompt]:
    """Token ids by the model's own tokenizer.json, special tokens added as it says, which a chat has already."""
    tokenizer = _tokenizer(folder)
    prompts = [
        Prompt(index, text, tuple(tokenizer.encode(text, add_special_tokens=adds_special_tokens).ids))
        for index, text in enumerate(texts)
    ]
    if empty := next((prompt for prompt in prompts if not prompt.token_ids), None):
        raise ConfigError(f"Prompt {empty.index} ({empty.text!r}) has no tokens.", "leave it out")
    return prompts


def decode(completions: Sequence[Sequence[int]], folder: Path | None) -> list[str]:
    """Texts of token ids, special tokens left out; empty texts where the model has no tokenizer."""
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
    """`count` prompts of exactly `length` random token ids, of which the first `shared` are those of all of them.

    They are the same for a seed everywhere.
    """
    draw = random.Random(seed)
    prefix = tuple(draw.randrange(vocab_size) for _ in range(shared))
    own = length - shared
    return [Prompt(index, "", (*prefix, *(draw.randrange(vocab_size) for _ in range(own)))) for index in range(count)]


def sampling_of(config: RunConfig) -> SamplingConfig:
    """The sampling of the run: a synthetic set fixes the number of new tokens."""
    if config.prompts.output_tokens is None:
        return config.sampling
    return replace(config.sampling, max_new_tokens=config.prompts.output_tokens, ignore_eos=True)


def check_context(prompts: Sequence[Prompt], max_new_tokens: int, context: int | None) -> None:
    """ConfigError where a prompt and its new tokens are longer than the model's context."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    needed = len(longest.token_ids) + max_new_tokens
    if context is not None and needed > context:
        raise ConfigError(
            f"Prompt {longest.index} has {len(longest.token_ids)} tokens; with {max_new_tokens} new ones that is "
            f"{needed}, and the context of the model is {context}.",
            f"sampling.max_new_tokens={max(context - len(longest.token_ids), 1)} or a shorter prompt"
            if len(longest.token_ids) < context
            else f"a prompt of at most {context - max_new_tokens} tokens",
        )


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """One JSON object a line: index, text, token_ids, arrival_s."""
    rows = (
        {"index": p.index, "text": p.text, "token_ids": list(p.token_ids), "arrival_s": p.arrival_s} for p in prompts
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_prompts(path: Path) -> list[Prompt]:
    """The inverse of `write_prompts`."""
    return [typed.decode(row, Prompt) for row in read_json_lines(path, ConfigError, "run it again")]
