"""A prompt set is token ids, the same everywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.base import Prompt
from launcher.config.schema import ConfigError, PromptsConfig, RunConfig, SamplingConfig
from launcher.models import EMBEDDED
from launcher.prompts.prompts import (
    check_context,
    decode,
    encode,
    read_prompts,
    read_texts,
    synthetic_prompts,
    write_prompts,
)

FOLDER = EMBEDDED / "tiny_falcon"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\n two \n", ["one", " two "]),
        ("a.jsonl", '{"prompt": "one\\ntwo"}\n\n"three"\n', ["one\ntwo", "three"]),
        ("a.txt", "\ufeffone\ntwo\n", ["one", "two"]),
        ("a.jsonl", '\ufeff{"prompt": "one"}\n', ["one"]),
        ("a.txt", "quotes \"'`$(id)` = é 漢\n", ["quotes \"'`$(id)` = é 漢"]),
    ],
)
def test_files_of_prompts(name: str, text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_texts(PromptsConfig(name="file", path=str(tmp_path / name))) == expected


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"Cannot read the prompts in .*a\.txt"):
        read_texts(PromptsConfig(name="file", path=str(tmp_path / "a.txt")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b'{"prompt": %s}\n' % (b"[" * 60 + b"]" * 60), "a.jsonl:1 is not valid JSON: more than 50 levels deep."),
        (b'"a"\n%s\n' % (b"[" * 10**6), "a.jsonl:2 is not valid JSON: more than 50 levels deep."),
        (b'{"prompt": %s}\n' % (b"9" * 5000), "a.jsonl:1 is not valid JSON: a number of 5,000 digits."),
        (b'{"prompt": NaN}\n', "a.jsonl:1 is not valid JSON: NaN is not a JSON number."),
        (b'{"prompt": 5}\n', 'a.jsonl:1 has no text under "prompt".'),
        (b'{"prompt": "%s"}\n' % (b"x" * (3 << 20)), "Prompt 0 has 3,145,728 letters, more than 2,097,152."),
        (b'"a"\n' * (10**5 + 1), "There are 100,001 prompts, more than 100,000."),
        (bytes(33 << 20), "a.jsonl: it has more than 33,554,432 bytes."),
        (None, "a.jsonl: it is a pipe, a socket or a device, not a regular file."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prompt_file_that_cannot_be_used_is_one_line(content: bytes | None, fact: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_texts(PromptsConfig(name="file", path=str(path)))
    assert fact in str(caught.value)
    assert " HINT: " in str(caught.value)


@pytest.mark.parametrize("texts", [[["a"]], [{"a": 1}], ["a", ["b"]]])
def test_prompts_that_are_no_texts_are_refused(texts: Any) -> None:
    with pytest.raises(ConfigError, match=r"Prompt \d is .*, not a text\. HINT: "):
        read_texts(PromptsConfig(name="seed", texts=texts))


def test_text_to_ids_and_back() -> None:
    texts = ["The capital of France is", "I am so fast"]
    prompts = encode(texts, FOLDER)
    assert [prompt.index for prompt in prompts] == [0, 1]
    assert decode([prompt.token_ids for prompt in prompts], FOLDER) == texts


def test_prompts_survive_their_file(tmp_path: Path) -> None:
    prompts = [Prompt(0, "a\nb", (1, 2)), Prompt(1, "é漢", (3,))]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    assert read_prompts(tmp_path / "prompts.jsonl") == prompts


def test_synthetic_prompts_have_exact_lengths_and_follow_the_seed() -> None:
    first = synthetic_prompts(3, 17, 100, seed=1)
    assert [len(prompt.token_ids) for prompt in first] == [17, 17, 17]
    assert all(0 <= token < 100 for prompt in first for token in prompt.token_ids)
    assert first == synthetic_prompts(3, 17, 100, seed=1)
    assert first != synthetic_prompts(3, 17, 100, seed=2)


@pytest.mark.parametrize(("new_tokens", "context", "fits"), [(3, 8, True), (4, 8, False), (4, None, True)])
def test_prompt_and_new_tokens_fit_the_context(new_tokens: int, context: int | None, fits: bool) -> None:
    prompts = [Prompt(0, "", (1, 2)), Prompt(1, "", (1, 2, 3, 4, 5))]
    config = RunConfig(prompts=PromptsConfig(), sampling=SamplingConfig(max_new_tokens=new_tokens))
    if fits:
        assert check_context(config, prompts, context) == 5 + new_tokens
    else:
        with pytest.raises(ConfigError, match=r"Prompt 1 has 5 tokens; with 4 new ones that is 9"):
            check_context(config, prompts, context)
