"""The format of records: older versions can be read, and real records match the JSON schema."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from running import ROOT, launcher, run

from launcher import load_record
from launcher.results import json_schema
from launcher.results.record import SCHEMA_VERSION, Record, read_record
from launcher.system.typed import to_plain

VERSION_1 = json.loads((ROOT / "tests" / "records" / "version_1.json").read_text())
SCHEMA = ROOT / "docs" / "record.schema.json"


def test_the_schema_in_the_documentation_is_current() -> None:
    command = "python -m launcher.results.json_schema > docs/record.schema.json"
    assert SCHEMA.read_text() == json_schema.text(), command
    jsonschema.Draft202012Validator.check_schema(json_schema.schema())


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, changed to forbid additional keys."""
    for definition in schema["$defs"].values():
        definition["additionalProperties"] = False
    return schema


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("backend=dummy", "backend.fail_at=generate"), ("backend=transformers",)])
def test_a_real_record_has_the_form_that_the_schema_says(
    overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("runs")
    ended = launcher(*overrides, "measure.repeats=1", "sampling.max_new_tokens=4", f"output_dir={out}")
    assert ended.code == (1 if "backend=dummy" in overrides else 0), ended.err
    [path] = out.glob("*/record.json")
    values = json.loads(path.read_text())
    jsonschema.validate(values, strict(json_schema.schema()))
    record = load_record(path.parent)
    assert record.schema_version == values["schema_version"] == SCHEMA_VERSION
    assert to_plain(record) == to_plain(read_record(values))
    assert (record.num_devices, record.world_size) == ((2, 2) if "backend=dummy" in overrides else (1, 1))
    assert json.loads(json.dumps(to_plain(record))) == values


def test_a_record_of_version_1_can_be_read() -> None:
    record = read_record(VERSION_1)
    assert isinstance(record, Record)
    assert (record.schema_version, record.world_size, record.num_devices, record.batch_size) == (2, 2, 2, 4)
    assert record.new_tokens_per_s == VERSION_1["new_tokens_per_s"]
    assert record.plan is not None
    assert record.plan.num_devices == 2
    assert [device.parameter_bytes for device in record.devices] == [3_281_920, 3_281_920]
    failed = VERSION_1["ranks"][0] | {"error": {"stage": "load", "type": "E", "message": "m", "hint": ""}}
    error = read_record(VERSION_1 | {"ranks": [failed]}).ranks[0].error
    assert error is not None
    assert (error.rank, error.stage) == (0, "load")


def test_a_run_of_version_1_is_in_the_history(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(VERSION_1 | {"run_dir": str(tmp_path / "run")}))
    ended = run([sys.executable, "-m", "launcher.status", str(tmp_path)])
    assert ended.last_json["points"] == {"ok": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "a record of schema version 3, and versions 1 to 2 are known"),
        ({"schema": None}, "a record of schema version None, and versions 1 to 2 are known"),
        ({"new_tokens_per_s": "fast"}, "Expected `float | null`, got `str` - at `$.new_tokens_per_s`"),
        ({"devices": [{"rank": 0}]}, "Object missing required field `device` - at `$.devices[0]`"),
    ],
)
def test_values_that_are_no_record(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_record(VERSION_1 | changes)
    with pytest.raises(ValueError, match="a record is a JSON object"):
        read_record([])
