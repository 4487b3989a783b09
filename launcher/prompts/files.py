"""Read prompt files: .txt and stdin have one prompt per line; .jsonl, .json, .csv and .tsv have rows with fields."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import math
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.composition.quoting import for_shell, quoted
from launcher.config.options import MOST_SECONDS
from launcher.config.schema import ConfigError
from launcher.system.files import sibling
from shards.untrusted_files import bounded, listed, parse_json, read_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from launcher.config.schema import PromptsConfig

ENCODING = "utf-8-sig"  # skips the byte order mark that Windows editors write
MAX_FIELD_CHARACTERS = 4 << 20
FIELDS = ("prompt", "text", "question", "instruction", "conversations", "messages")
"""The fields that are tried in this order if `prompts.field` is not set."""

TABLES = {".csv": ",;\t", ".tsv": "\t"}
ROW_FILES = (".jsonl", ".ndjson", ".json", *TABLES)
ASKING = ("user", "human")
"""The user's roles in the formats of OpenAI and ShareGPT: their first turn in a conversation is the prompt."""

NAMED = 'prompts.path= a .jsonl with {"prompt": "...", "adapter": "NAME"} a line, or adapter.paths={}'
WITH_ARRIVALS = 'load.arrivals=false, or prompts.path= a .jsonl with {"prompt": "...", "arrival_s": 0.5} a line'


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file: a JSON value or the fields of a table's row, and its location for errors."""

    location: str
    value: Any


def read_file(source: PromptsConfig) -> list[str]:
    """The prompts of a file; ConfigError if it cannot be read, or if a row has no prompt."""
    assert source.path is not None, "a prompt set without a file has texts"
    path = Path(source.path)
    if path.suffix.lower() not in ROW_FILES:
        if source.field is not None:
            fact = f"prompts.field={source.field}, and {path} has no fields: it is read as a prompt a line."
            raise ConfigError(fact, "prompts.field=null")
        return [line for line in _content(path).split("\n") if line.strip()]  # splitlines() also splits at U+2028
    rows = _rows(path)
    field = source.field or _usual_field(rows, path)
    texts = []
    for row in rows:
        value = row.value
        if isinstance(row.value, dict):
            value = row.value.get(field)
        elif source.field is not None:  # with a chosen field, rows without fields are invalid
            value = None
        text = _question(value)
        if not text:
            hint = _field_like(field, [row]) or f'{{"{field}": "The capital of France is"}}, or leave it out'
            raise ConfigError(f'{row.location} has no text under "{field}".', hint)
        texts.append(text)
    return texts


def read_arrivals(source: PromptsConfig) -> list[float]:
    """The arrival times of the prompts in a file of rows, in seconds; ConfigError if one is missing or decreasing."""
    path = Path(source.path or "")
    if path.suffix.lower() not in ROW_FILES:
        fact = f"load.arrivals=true, and prompts={source.name} has no arrival times."
        raise ConfigError(fact, WITH_ARRIVALS)
    moments: list[float] = []
    earliest = 0.0
    for row in _rows(path):
        moment, given = math.nan, None
        if isinstance(row.value, dict):
            given = row.value.get("arrival_s")
        if isinstance(given, int | float | str) and not isinstance(given, bool):
            with contextlib.suppress(ValueError):  # cells of tables are texts
                moment = float(given)
        if not earliest <= moment <= MOST_SECONDS:
            fact = f'{row.location} has no "arrival_s" of {earliest:g} or more.'
            raise ConfigError(fact, 'seconds from the start, in order: {"prompt": "...", "arrival_s": 0.5}')
        moments.append(moment)
        earliest = moment
    return moments


def read_adapters(source: PromptsConfig, names: Collection[str]) -> list[str | None]:
    """The adapter of each prompt in a file of rows, one of `names`, or None for the plain model.

    ConfigError for an unknown name, or if no prompt names an adapter.
    """
    path = Path(source.path or "")
    rows = _rows(path) if path.suffix.lower() in ROW_FILES else []
    chosen: list[str | None] = []
    for row in rows:
        name = None
        if isinstance(row.value, dict):
            name = row.value.get("adapter") or None
        if name is not None and name not in names:
            fact = f"{row.location} names the adapter {str(name)[:80]!r}, and adapter.paths has {', '.join(names)}."
            raise ConfigError(fact, for_shell("adapter.paths={NAME: FOLDER}"))
        chosen.append(name)
    if not any(chosen):
        raise ConfigError(f"No prompt of {path} names an adapter, and adapter.paths has {', '.join(names)}.", NAMED)
    return chosen


def _rows(path: Path) -> list[Row]:
    content, suffix = _content(path), path.suffix.lower()
    if suffix in TABLES:
        return _rows_of_table(content, path, TABLES[suffix])
    if suffix == ".json":
        hint = "a list of objects; with one a line the file's name is .jsonl"
        value = parse_json(content, str(path), ConfigError, hint)
        if isinstance(value, dict):
            lists = {key: items for key, items in value.items() if isinstance(items, list)}
            if len(lists) == 1:
                value = next(iter(lists.values()))
        if not isinstance(value, list):
            fact = f"{path} is neither a list of prompts nor an object with one list."
            raise ConfigError(fact, 'a file like [{"prompt": "The capital of France is"}]')
        return [Row(f"{path}: item {number}", item) for number, item in enumerate(value)]
    lines = ((f"{path}:{number}", line) for number, line in enumerate(content.split("\n"), 1) if line.strip())
    return [Row(location, parse_json(line, location, ConfigError, "one object a line")) for location, line in lines]


def _rows_of_table(content: str, path: Path, separators: str) -> list[Row]:
    """The rows of a table, whose first row names the columns; the separator is the most frequent one in that row."""
    first = content.partition("\n")[0]
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=max(separators, key=first.count), strict=True)
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    rows: list[Row] = []
    names: list[str] | None = None
    try:
        for fields in reader:
            location = f"{path}:{reader.line_num}"
            if not fields:
                continue
            if names is None:
                names = [name.strip() for name in fields]
            elif len(fields) > len(names):
                fact = f"{location} has {len(fields)} fields, and the first line names {len(names)}."
                raise ConfigError(fact, 'a field that has a comma in it is in quotes: "One, two"')
            else:
                rows.append(Row(location, dict(zip(names, fields, strict=False))))
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num} is not CSV: {error}.", "save it as CSV in UTF-8 again") from None
    return rows


def _usual_field(rows: Sequence[Row], path: Path) -> str:
    """The first of FIELDS that the first row with fields has; ConfigError if it has none of them."""
    names = next((list(row.value) for row in rows if isinstance(row.value, dict)), list(FIELDS))
    for name in FIELDS:
        if name in names:
            return name
    fact = f"{path} has the fields {listed(names, 8)}, and none of {', '.join(FIELDS)}."
    raise ConfigError(fact, _field_like("prompt", rows) or 'a field "prompt"')


def _question(value: Any) -> str | None:
    """The prompt in a value: the text itself, or the first question of a conversation, which is a list of texts, or of
    turns in the format of OpenAI or ShareGPT. None for anything else."""
    turns = value
    if not isinstance(value, list):
        turns = [value]
    for turn in turns:
        if isinstance(turn, str):
            return turn
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ASKING:
            content = turn.get("content", turn.get("value"))
            if isinstance(content, str):
                return content
            return None
    return None


def _field_like(field: str, rows: Sequence[Row]) -> str | None:
    """A hint `prompts.field=NAME` for the field of the first row that has a text and is most similar to `field`."""
    first = next((row.value for row in rows if isinstance(row.value, dict)), {})
    names = [name for name, value in first.items() if name and name != field and _question(value)]
    for name in difflib.get_close_matches(field, names, 1, cutoff=0):
        if name.isidentifier():
            return for_shell(f"prompts.field={name}")
        return for_shell(f"prompts.field={quoted(name)}")
    return None


def _content(path: Path) -> str:
    try:
        if path == Path("-"):
            return _stdin().decode(ENCODING)
        return read_bytes(path).decode(ENCODING)
    except UnicodeDecodeError as error:
        hint = f"iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > utf8{path.suffix}; prompts.path=utf8{path.suffix}"
        raise ConfigError(f"Cannot read the prompts in {path}: {error}.", hint) from None
    except OSError as error:
        near = sibling(path)
        if near:
            hint = for_shell(f"prompts.path={near}")
        else:
            hint = "prompts=seed prompts.path=null, or prompts.path= a file of texts"
        raise ConfigError(f"Cannot read the prompts in {path}: {error.strerror}.", hint) from None


@cache
def _stdin() -> bytes:
    """Standard input, read once for all points of a sweep."""
    with open(0, "rb", closefd=False) as file:
        return bounded(file, "stdin")
