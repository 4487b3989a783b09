"""Prompt files of every format: the texts in them, and a one-line error for invalid files."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import pytest

from launcher.composition.compose import compose_run
from launcher.config.schema import ConfigError, PromptsConfig
from launcher.prompts.files import read_arrivals, read_file

if TYPE_CHECKING:
    from pathlib import Path

SHAREGPT = [
    {"id": "a", "conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "one?"}]},
    {"id": "b", "conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "y"}]},
]
OPENAI = [{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "one"}]}]


def read(folder: Path, name: str, content: str, field: str | None = None) -> list[str]:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return read_file(PromptsConfig(name="file", path=str(folder / name), field=field))


@pytest.mark.parametrize(
    ("name", "content", "field", "expected"),
    [
        ("a.csv", 'id,prompt\n1,one\n2,"two, ""2""\nand more"\n', None, ["one", 'two, "2"\nand more']),
        ("a.csv", "\ufeffquestion;answer\r\none;1\r\n\r\ntwo, too;2\r\n", None, ["one", "two, too"]),
        ("a.tsv", "text\tid\none, two\t1\n", None, ["one, two"]),
        ("a.CSV", "prompt\none\n", None, ["one"]),
        ("a.csv", "a,b\none,two\n", "b", ["two"]),
        ("a.json", '["one", "two"]', None, ["one", "two"]),
        ("a.json", '[{"text": "no", "prompt": "one"}, {"prompt": "two"}]', None, ["one", "two"]),
        ("a.json", '{"version": 1, "data": [{"instruction": "one"}]}', None, ["one"]),
        ("a.json", json.dumps(SHAREGPT), None, ["one?", "two?"]),
        ("a.json", json.dumps(OPENAI, indent=2), None, ["one"]),
        ("a.jsonl", "\n".join(map(json.dumps, SHAREGPT)), None, ["one?", "two?"]),
        ("a.jsonl", '{"question": "one"}\n{"question": "two"}\n', None, ["one", "two"]),
        ("a.ndjson", '{"turns": ["one", "two"]}\n', "turns", ["one"]),
        ("a.jsonl", '{"prompt": "a\u2028b"}\n', None, ["a\u2028b"]),
    ],
)
def test_texts_of_a_file(name: str, content: str, field: str | None, expected: list[str], tmp_path: Path) -> None:
    assert read(tmp_path, name, content, field) == expected


@pytest.mark.parametrize(
    ("name", "content", "field", "fact", "hint"),
    [
        ("a.csv", "id,query\n1,a\n", None, "a.csv has the fields id, query, and none of prompt, text, ", "query"),
        ("a.csv", "prompt,more text\n,a\n", None, 'a.csv:2 has no text under "prompt".', "more text"),
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', None, 'a.jsonl:2 has no text under "prompt".', "promt"),
        ("a.json", '[{"a": "b"}]', "c", 'a.json: item 0 has no text under "c".', "a"),
        ("a.jsonl", '"a"\n', "c", 'a.jsonl:1 has no text under "c".', None),
        ("a.csv", "prompt\na,b\n", None, "a.csv:2 has 2 fields, and the first line names 1.", None),
        ("a.csv", 'prompt\n"a\n', None, "a.csv:2 is not CSV: unexpected end of data.", None),
        ("a.csv", "prompt\n" + "x" * (5 << 20), None, "a.csv:2 is not CSV: field larger than field limit", None),
        ("a.json", '{"prompt": "a"}', None, "a.json is neither a list of prompts nor an object with one list.", None),
        (
            "a.json",
            '{"a": [], "b": []}',
            None,
            "a.json is neither a list of prompts nor an object with one list.",
            None,
        ),
        ("a.json", '"a"\n"b"', None, "a.json is not valid JSON: Extra data", None),
        ("a.json", "[" * 99 + "]" * 99, None, "a.json is not valid JSON: more than 50 levels deep.", None),
        (
            "a.json",
            json.dumps([{"conversations": []}]),
            None,
            'a.json: item 0 has no text under "conversations".',
            None,
        ),
        ("a.json", '[{"messages": [{"role": "user", "content": [1]}]}]', None, "no text under ", None),
    ],
)
def test_a_file_without_texts_is_one_line_with_the_field_that_was_meant(
    name: str, content: str, field: str | None, fact: str, hint: str | None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, name, content, field)
    assert fact in caught.value.fact
    assert caught.value.hint
    if hint is not None:
        overrides = ["prompts=file", f"prompts.path={tmp_path / name}", *shlex.split(caught.value.hint)]
        assert compose_run(overrides).prompts.field == hint


def test_a_field_of_what_has_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts.field=a, and .*a.txt has no fields.* HINT: prompts.field=null"):
        read(tmp_path, "a.txt", "one\n", "a")
    with pytest.raises(ConfigError, match=r"prompts=seed has no file, and does not use prompts\.field=a\."):
        compose_run(["prompts.field=a"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,arrival_s\na,0\nb,1.5\n"),
        ("a.json", '[{"prompt": "a", "arrival_s": 0}, {"prompt": "b", "arrival_s": 1.5}]'),
        ("a.jsonl", '{"prompt": "a", "arrival_s": 0}\n{"prompt": "b", "arrival_s": 1.5}\n'),
    ],
)
def test_moments_of_prompts_are_read_from_every_file_of_rows(name: str, content: str, tmp_path: Path) -> None:
    assert read(tmp_path, name, content) == ["a", "b"]
    wanted = PromptsConfig(name="file", path=str(tmp_path / name))
    assert read_arrivals(wanted) == [0.0, 1.5]
    (tmp_path / name).write_text(content.replace("1.5", "-1").replace("0", "nan"))
    with pytest.raises(ConfigError):
        read_arrivals(wanted)
