"""Hashes of a record and the files beside it, to detect changes after the run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.results.record import Seal
from launcher.run_dir.typed_files import MAX_RUN_BYTES
from launcher.system.typed import to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.results.record import Record
    from shards.untrusted_files import JsonObject

FILES = (
    "run.json", "config.yaml", "plan.json", "prompts.jsonl", "completions.jsonl", "rank_*.json",
    "rank_*.completions.jsonl", "rank_*.repeats.jsonl", "attempt_*/rank_*.json",
    "attempt_*/rank_*.completions.jsonl", "attempt_*/rank_*.repeats.jsonl",
)  # fmt: skip
"""The files that describe the run, and those from which the record's figures and texts are computed; no logs."""


def sealed(record: Record, folder: Path) -> Record:
    """A record with the hashes of its files in a folder, and of itself."""
    seal = Seal("", hashes(folder))
    bare = replace(record, seal=seal)
    return replace(bare, seal=replace(seal, record=digest(to_plain(bare))))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that the record depends on, by its path in the folder; instead a reason for a file that
    cannot be read or is larger than MAX_RUN_BYTES."""
    paths = sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})
    hashed = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            if (size := path.stat().st_size) > MAX_RUN_BYTES:
                hashed[name] = f"{size} bytes, which are not hashed"
                continue
            with path.open("rb") as file:
                hashed[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            hashed[name] = f"cannot be read: {error.strerror}"
    return hashed


def digest(values: JsonObject) -> str:
    """SHA-256 of the plain values of a record, independent of the layout of its file; `seal.record` counts as empty."""
    bare = values | {"seal": values["seal"] | {"record": ""}}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def broken_seal(values: JsonObject, folder: Path) -> list[str]:
    """A sentence for each file that has changed since the record was written, and one for the record itself if it has.

    `values` are the plain values of the record's file.
    """
    seal = values.get("seal")
    if not isinstance(seal, dict) or not isinstance(seal.get("files"), dict):
        return ["the record has no hashes, as those of older versions"]
    if seal.get("record") == digest(values):
        problems = []
    else:
        problems = ["the record is not as it was written"]
    before, now = seal["files"], hashes(folder)
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            problems.append(f"{name} is missing")
        elif name not in before:
            problems.append(f"{name} was added")
        elif before[name] != now[name]:
            problems.append(f"{name} is not as it was written")
    return problems
