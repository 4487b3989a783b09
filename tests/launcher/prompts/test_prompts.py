"""A prompt set is token ids, the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.backends.base import Prompt
from launcher.config.schema import ConfigError, PromptsConfig
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
    if fits:
        check_context(prompts, new_tokens, context)
    else:
        with pytest.raises(ConfigError, match=r"Prompt 1 has 5 tokens; with 4 new ones that is 9"):
            check_context(prompts, new_tokens, context)
