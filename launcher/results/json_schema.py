"""Generate the JSON schema of a record from its dataclasses: `python -m launcher.results.json_schema > FILE`.

`docs/record.schema.json` contains its output.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from launcher.results.record import SCHEMA_VERSION, Record

if TYPE_CHECKING:
    from shards.untrusted_files import JsonObject


def schema() -> JsonObject:
    """The JSON schema (draft 2020-12) of a record of the current version."""
    [reference], definitions = msgspec.json.schema_components([Record], ref_template="#/$defs/{name}")
    definitions["Record"]["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    definitions["Record"]["required"].append("schema_version")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **reference, "$defs": definitions}


def text() -> str:
    """The schema as JSON text."""
    return json.dumps(schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(text(), end="")
