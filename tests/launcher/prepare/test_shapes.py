"""Invalid config files: each is refused at once, in one line."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from launcher.models import EMBEDDED
from launcher.prepare.shapes import config_of
from shards.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

GIVEN = json.loads((EMBEDDED / "tiny_llama" / "config.json").read_text())
TEXTS = {
    "empty": (b"", "is not valid JSON: Expecting value"),
    "no JSON": (b"{'a': 1}", "is not valid JSON: Expecting property name"),
    "no UTF-8": (b'"\xff"', "is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
    "a list": (b"[]", "has no vocab_size"),
    "no vocabulary": (b"{}", "has no vocab_size"),
    "NaN": (b'{"vocab_size": NaN}', "is not valid JSON: NaN is not a JSON number"),
    "an infinity": (b'{"vocab_size": -Infinity}', "is not valid JSON: -Infinity is not a JSON number"),
    "a float too large": (b'{"vocab_size": 1e999}', "is not valid JSON: 1e999 is too large a number"),
    "400 digits": (b'{"vocab_size": %s}' % (b"9" * 400), "is not valid JSON: a number of 400 digits"),
    "5000 digits": (b'{"vocab_size": %s}' % (b"9" * 5000), "is not valid JSON: a number of 5,000 digits"),
    "deep": (b'{"vocab_size": %s}' % (b"[" * 60 + b"]" * 60), "is not valid JSON: more than 50 levels deep"),
    "very deep": (b'{"vocab_size": %s}' % (b"[" * 10**6), "is not valid JSON: more than 50 levels deep"),
    "a family that is a dict": (b'{"vocab_size": 1, "model_type": {}}', "gives model_type={}, not a text"),
    "layers without end": (
        json.dumps({**GIVEN, "num_hidden_layers": 10**9}).encode(),
        "gives num_hidden_layers=1000000000, not a whole number from 1 to 1,000",
    ),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_config_that_cannot_be_used_is_one_line(tmp_path: Path, kind: str) -> None:
    content, fact = TEXTS[kind]
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, fact)


@pytest.mark.parametrize(
    ("target", "fact"),
    [
        ("/dev/zero", "config.json cannot be read: it is a pipe, a socket or a device, not a regular file"),
        ("pipe", "config.json cannot be read: it is a pipe, a socket or a device, not a regular file"),
        (".", "config.json cannot be read: it is a folder"),
        ("config.json", "config.json cannot be read: Too many levels of symbolic links"),
        ("gone", "has no config.json"),
        ("sparse", "config.json cannot be read: it has more than 33,554,432 bytes"),
    ],
)
def test_a_config_that_is_no_file_is_one_line(tmp_path: Path, target: str, fact: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 5 << 30)
    (tmp_path / "config.json").symlink_to(target)
    refused(tmp_path, fact)


def refused(folder: Path, fact: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(folder)
    assert fact in str(caught.value)
    assert " HINT: " in str(caught.value)
    assert "\n" not in str(caught.value)
