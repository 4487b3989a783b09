"""Verifying runs: edits are detected, each check fails for some record, and runs are repeated."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import run

from launcher import reproduce, verify
from launcher.backends.base import DeviceMemory
from launcher.results.figures.cost import DeviceSample
from launcher.results.figures.validity import Validity, check_reference, of_the_record
from launcher.results.measured import CeilingShare, Partial, Spread
from launcher.results.record import Record
from launcher.run_dir.run_dir import RunDir
from launcher.run_dir.verify import references_in, verdict_of
from launcher.run_dir.verify import verify as verify_run
from shards.plan.memory import DevicePlan

pytestmark = pytest.mark.slow  # the shared fixtures take seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the dummy engine with prompts of a file that no longer exists."""
    folder = tmp_path_factory.mktemp("verify")
    prompts = folder / "prompts.txt"
    prompts.write_text("one\nand another\n")
    words = ["backend=dummy", "devices=2", "accelerator=cpu", "backend.step_s=0.005", f"output_dir={folder / 'runs'}"]
    words += ["prompts=file", f"prompts.path={prompts}", "sampling.max_new_tokens=12", "--json"]
    ended = run([sys.executable, "-m", "launcher", *words])
    assert ended.code == 0, ended.err
    prompts.unlink()
    return Path(ended.last_json["run_dir"])


def edited(made: Path, folder: Path, name: str, old: str, new: str) -> Path:
    """A copy of the run in which `old` is replaced by `new` in one file."""
    copy = Path(shutil.copytree(made, folder / "copy"))
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    return copy


def reasons(run_dir: Path) -> list[str]:
    return [reason for reason in verify_run(RunDir(run_dir)).reasons if "differ by a factor" not in reason]


def test_a_run_as_it_was_written(made: Path, tmp_path: Path) -> None:
    assert reasons(made) == []
    moved = Path(shutil.copytree(made, tmp_path / "moved"))
    (moved / "rank_0.log").write_text("logs are not what figures are made of")
    assert reasons(moved) == []


def test_a_token_or_a_figure_that_was_edited_is_seen(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    speed = f'"new_tokens_per_s": {record["new_tokens_per_s"]}'
    by_name = {
        "completions.jsonl": ('"token_ids": [', '"token_ids": [9, '),
        "prompts.jsonl": ("one", "two"),
        "config.yaml": ("seed: 0", "seed: 1"),
        "rank_1.repeats.jsonl": ('"same_tokens": true', '"same_tokens": false'),
    }
    for number, (name, (old, new)) in enumerate(by_name.items()):
        copy = edited(made, tmp_path / str(number), name, old, new)
        assert reasons(copy)[0] == f"{name} is not as it was written"
    figure = edited(made, tmp_path / "figure", "record.json", speed, '"new_tokens_per_s": 99999.0')
    assert reasons(figure)[0] == "the record is not as it was written"
    assert reasons(figure)[1].startswith("new_tokens_per_s is 99999.0 in the record, and ")
    (made_without := Path(shutil.copytree(made, tmp_path / "missing"))).joinpath("rank_1.repeats.jsonl").unlink()
    assert reasons(made_without)[0] == "rank_1.repeats.jsonl is missing"
    values = record | {"seal": None}
    (figure / "record.json").write_text(json.dumps(values))
    assert reasons(figure) == ["the record has no hashes, as those of older versions"]


def test_the_layout_of_the_record_is_not_what_it_says(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    (copy / "record.json").write_text(json.dumps(json.loads((copy / "record.json").read_text()), indent=None))
    assert reasons(copy) == []


def test_what_somebody_else_wrote_is_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    values = json.loads((copy / "record.json").read_text())
    for config in ({}, {"measure": [1], "sampling": 3}):
        (copy / "record.json").write_text(json.dumps(values | {"config": config}))
        assert verify.main([str(copy)]) == 2
        assert re.fullmatch(r".*record.json is not a valid file of a run: .*\n", capsys.readouterr().err)
        assert verdict_of(RunDir(copy)) == "unreadable"
    shutil.copy(made / "record.json", copy)
    with (copy / "rank_9.json").open("wb") as file:
        file.truncate(1 << 40)
    assert reasons(copy) == ["rank_9.json was added"]


def test_the_tokens_of_a_reference(made: Path, tmp_path: Path) -> None:
    """Copies serve as runs of the reference engine: its name is written to both files that are read."""
    copies = [Path(shutil.copytree(made, tmp_path / name)) for name in ("run", "reference", "other")]
    for copy in copies[1:]:
        for name in ("run.json", "record.json"):
            values = json.loads((copy / name).read_text())
            backend = {"name": "transformers", "python": None, "device_map": "auto"}
            values["config"]["backend"] = backend
            values |= {"backend": "transformers"} if name == "record.json" else {}
            (copy / name).write_text(json.dumps(values))
    references = references_in(tmp_path)
    assert [reference.path.name for reference in references] == ["other", "reference"]
    checks = {check.name: check for check in verify_run(RunDir(copies[0]), references).checks}
    assert (checks["reference"].is_met, checks["reference"].text) == (True, "the tokens of other, reference")
    lines = (copies[2] / "completions.jsonl").read_text()
    (copies[2] / "completions.jsonl").write_text(lines.replace('"token_ids": [', '"token_ids": [9, ', 1))
    assert verify_run(RunDir(copies[0]), references).reasons[-1] == "1 of 2 answers differ from the reference's (other)"


def test_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = edited(made, tmp_path, "completions.jsonl", '"token_ids": [', '"token_ids": [9, ')
    assert verify.main([str(made), str(copy), "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    assert [one["run_dir"] for one in line["runs"]] == [str(made), str(copy)]
    assert (line["valid"], line["runs"][1]["valid"]) == (False, False)
    assert verify.main([str(copy)]) == 1
    assert "INVALID: completions.jsonl is not as it was written" in capsys.readouterr().out
    assert verify.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path} has no record.json. HINT: ")


def test_a_run_is_made_again_from_its_directory(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main([str(made), "--output-dir", str(tmp_path), "--json"])
    line = json.loads(capsys.readouterr().out)
    assert "answers have other tokens" not in " ".join(line["objections"])
    again = Path(line["run_dir"])
    assert again.parent == tmp_path
    assert (again / "prompts.jsonl").read_text() == (made / "prompts.jsonl").read_text()
    other = edited(made, tmp_path, "completions.jsonl", '"token_ids": [', '"token_ids": [9, ')
    assert reproduce.main([str(other), "--output-dir", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["objections"][0] == "1 of 2 answers have other tokens"
    assert reproduce.main([str(tmp_path), "--output-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path} has no record.json. HINT: python -m launcher.status runs, which names run directories\n"
    )


def planned(parameter_bytes: int, cache: int) -> DevicePlan:
    return DevicePlan(0, parameter_bytes, cache, 0, 0, 0, 0, None)


def bad(record: Record, **changes: Any) -> list[str]:
    return Validity(tuple(of_the_record(replace(record, **changes), 0.01))).reasons


def test_each_check_has_its_reason(made: Path) -> None:
    record = RunDir(made).read_record()
    assert record is not None
    assert record.metrics is not None
    assert record.totals is not None
    assert record.plan is not None
    steady = replace(record.metrics, new_tokens_per_s=Spread(10.0, 9.5, 10.5, (10.0, 9.5, 10.5)))
    good = replace(record, metrics=steady)
    assert bad(good) == []
    assert bad(good, status="oom") == ["the run did not end well: oom"]
    assert bad(good, partial=Partial(1, 2)) == ["only 1 of 2 prompts were measured at once"]
    cold = good.config | {"measure": good.config["measure"] | {"warmup": 0}}
    assert bad(good, config=cold) == ["there was no warm-up: measure.warmup=1"]
    few = replace(steady, new_tokens_per_s=Spread(10.0, 9.5, 10.5, (9.5, 10.5)))
    assert bad(good, metrics=few) == ["2 of at least 3 repeats: measure.repeats=3"]
    apart = replace(steady, new_tokens_per_s=Spread(10.0, 5.0, 10.0, (10.0, 5.0, 10.0)))
    assert bad(good, metrics=apart) == ["new tokens/s of the repeats differ by a factor of 2, above 1.2"]
    others = replace(record.totals, same_tokens_every_repeat=False)
    assert bad(good, totals=others) == ["the repeats gave different tokens"]
    assert bad(good, ceiling=CeilingShare(share=1.2, impossible=True)) == [
        "120% of the decode ceiling: a figure, or a rate of the machine, is wrong"
    ]
    note = "GPU-1: process 7 (python) already held 1.00 GiB when the run began"
    assert bad(good, notes=(note,)) == [note]
    assert record.cost is not None
    sample = DeviceSample(0.0, "repeats", "GPU-1", 300.0, 1.0, 1000.0, 80.0)
    warm = replace(record.cost, samples=(sample,))
    assert bad(good, cost=warm) == []
    assert bad(good, cost=replace(warm, slowed_by=("GPU-1: heat (hardware)",))) == [
        "the clocks were slowed: GPU-1: heat (hardware)"
    ]
    plan = replace(record.plan, devices=(planned(1000, 100),))
    held = DeviceMemory(0, "cuda:0", parameter_bytes=1000, kv_cache_bytes=100)
    assert bad(good, plan=plan, devices=(held,)) == []
    assert bad(good, plan=plan, devices=(replace(held, parameter_bytes=2000),)) == [
        "rank 0 held 2,000 bytes of parameters, and 1,000 were planned"
    ]
    assert bad(good, plan=plan, devices=(replace(held, kv_cache_reserved_bytes=200),)) == [
        "rank 0 had 200 bytes of KV cache, and 100 were planned"
    ]
    assert check_reference([], []).is_met is None
