"""Comparing two runs: tokens, first divergence, repetition, speed, thresholds, and runs that cannot be compared."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from running import ROOT

from launcher import compare as command
from launcher.report import comparison_table
from launcher.results.comparison import (
    Comparison,
    Difference,
    Divergence,
    FinishedRun,
    Ratio,
    alike,
    compare,
    is_degenerate,
    labels,
)
from launcher.results.completions import ReportedCompletion
from launcher.results.figures.metrics import figures
from launcher.results.measured import Repeat
from launcher.results.record import Record
from launcher.run_dir.finished import read_finished
from shards.errors import UserError

pytestmark = pytest.mark.slow  # the shared fixtures take seconds

PROMPTS = {0: (5, 6), 1: (7,)}


def one_repeat(tokens_per_s: float) -> Repeat:
    """A rank's measurements of one prompt that was answered at this speed."""
    return Repeat(
        number=0,
        wall_s=60 / tokens_per_s,
        prefill_s=None,
        decode_s=None,
        completions=1,
        prompt_tokens=1,
        new_tokens=60,
        decode_steps=59,
        lengths=((1, 60),),
        ttft_s=(),
        itl_s=(),
        same_tokens=True,
    )


def run(
    name: str,
    *token_ids: list[int],
    gaps: list[list[float]] | None = None,
    speed: tuple[float, ...] = (10.0, 12.0, 8.0),
    prompts: dict[int, tuple[int, ...]] | None = None,
    **config: Any,
) -> FinishedRun:
    """A finished run of engine `name` whose completions are `token_ids`."""
    rows = {
        index: ReportedCompletion(index, "", "", tuple(ids), 1, len(ids), "length", tuple(gaps[index]) if gaps else ())
        for index, ids in enumerate(token_ids)
    }
    measured = figures([[one_repeat(tokens_per_s)] for tokens_per_s in speed], 1, 1)
    assert measured is not None
    record = Record(
        status="ok",
        backend=name,
        model="tiny",
        precision="fp32",
        world_size=1,
        num_devices=1,
        num_nodes=1,
        batch_size=1,
        metrics=measured.metrics,
        config={"backend": {"name": name}, "model": {"name": "tiny", "path": "/tiny"}, "devices": 1, **config},
    )
    return FinishedRun(Path("/runs") / name, record, PROMPTS if prompts is None else prompts, rows)


@pytest.mark.parametrize(
    ("engines", "weights", "told"),
    [
        (("fsdp", "vllm"), "random", 1),
        (("fsdp", "transformers"), "random", 0),
        (("vllm", "vllm"), "random", 0),
        (("fsdp", "vllm"), "auto", 0),
    ],
)
def test_other_random_weights_are_told(engines: tuple[str, str], weights: str, told: int) -> None:
    model = {"name": "tiny", "path": "/tiny", "weights": weights}
    found = compare(*(run(name, [1], [2], model=model) for name in engines))
    assert len(found.notes) == told


@pytest.mark.parametrize(
    ("token_ids", "finish_reason", "expected"),
    [
        ([9] * 8, "length", True),
        ([1, 2, 3] + [9] * 8, "length", True),
        ([9] * 7, "length", False),
        ([9] * 8 + [0], "stop", True),
        ([9] * 7 + [0], "stop", False),
        ([4, 5] * 4, "length", True),
        ([4, 5, 6] * 4, "length", False),
        ([9] * 20 + [1], "length", False),
        ([], "stop", False),
    ],
)
def test_text_that_only_repeats_itself(token_ids: list[int], finish_reason: str, expected: bool) -> None:
    assert is_degenerate(token_ids, finish_reason) == expected


@pytest.mark.parametrize(
    ("base", "other", "divergences"),
    [
        (run("a", [1, 2], [3]), run("b", [1, 2], [3]), ()),
        (run("a", [], [3]), run("b", [], [3]), ()),
        (run("a", [1, 2], [3]), run("b", [1, 9], [3]), (Divergence(0, 1, 2, 9, None),)),
        (run("a", [1], [3]), run("b", [1, 2], [3]), (Divergence(0, 1, None, 2, None),)),
        (run("a", [1, 2], [3]), run("b", [], [4]), (Divergence(0, 0, 1, None, None), Divergence(1, 0, 3, 4, None))),
        (
            run("a", [1, 2], [3], gaps=[[0.5, 0.25], [0.125]]),
            run("b", [1, 9], [3], gaps=[[4.0, 4.0], [4.0]]),
            (Divergence(0, 1, 2, 9, 0.25),),
        ),
        (
            run("a", [1, 2], [3]),
            run("b", [1, 9], [3], gaps=[[0.5, 0.75], [0.5]]),
            (Divergence(0, 1, 2, 9, 0.75),),
        ),
        (
            run("a", [1], [3], gaps=[[0.5], [0.5]]),
            run("b", [1, 9], [3], gaps=[[0.5, 0.75], [0.5]]),
            (Divergence(0, 1, None, 9, 0.75),),
        ),
    ],
    ids=["same", "both empty", "token", "longer", "empty", "gap of the base", "gap of the other", "gap of the longer"],
)
def test_where_completions_part(base: FinishedRun, other: FinishedRun, divergences: tuple[Divergence, ...]) -> None:
    found = compare(base, other)
    assert (found.divergences, found.matching) == (divergences, 2 - len(divergences))


def test_whole_comparison() -> None:
    base = run("a", [1] * 8, [3], speed=(10.0, 12.0, 8.0), precision="fp32", sampling={"max_new_tokens": 8, "top_k": 0})
    other = run("b", [1, 2], [3], speed=(20.0, 6.0, 5.0), precision="bf16", sampling={"max_new_tokens": 2, "top_k": 0})
    assert compare(base, other) == Comparison(
        base="/runs/a",
        other="/runs/b",
        prompts=2,
        matching=1,
        divergences=(Divergence(0, 1, 1, 2, None),),
        base_degenerate=(0,),
        other_degenerate=(),
        speed=Ratio(median=pytest.approx(0.6), min=pytest.approx(5 / 12), max=pytest.approx(2.5)),
        differences=(Difference("precision", "fp32", "bf16"), Difference("sampling.max_new_tokens", 8, 2)),
    )
    assert compare(base, other).match == 0.5


def test_runs_of_different_prompts_cannot_be_compared() -> None:
    with pytest.raises(UserError) as error:
        compare(run("a", [1], [3]), run("b", [1], [3], prompts={0: (5, 6), 1: (8,)}))
    assert str(error.value) == (
        "a has 2 prompts, b 2, and 1 of them are the same token ids. HINT: compare runs of one model and one prompt set"
    )


def test_runs_of_one_engine_are_told_apart() -> None:
    seeds = [run("a", [1], seed=seed, output_dir="x") for seed in (1, 2)]
    assert labels([*seeds, run("b", [1])]) == ["a x1 seed=1", "a x1 seed=2", "b x1"]
    twice = [run("a", [1]), run("a", [1]), run("b", [1])]
    twice[1] = replace(twice[1], run_dir=Path("/runs/later"))
    assert labels(twice) == ["a x1 a", "a x1 later", "b x1"]
    guesses = [
        run("a", [1], speculative={"name": kind, "tokens": tokens}) for kind, tokens in (("none", 0), ("draft", 4))
    ]
    assert labels(guesses) == ["a x1 speculative=none", "a x1 speculative=draft"]


def test_a_note_names_the_model_that_each_run_had() -> None:
    base = run("fsdp", [1], model={"name": "tiny_falcon", "path": "/f"})
    other = run("vllm", [1], model={"name": "tiny_llama", "path": "/l"})
    out = Console(file=io.StringIO(), width=140)
    comparison_table.show([base, other], out)
    assert isinstance(out.file, io.StringIO)
    printed = out.file.getvalue()
    assert "note: vllm x1 has model.name=tiny_llama, fsdp x1 has model.name=tiny_falcon\n" in printed


def test_groups_of_runs_that_can_be_compared() -> None:
    a, b, c = run("a", [1], [3]), run("b", [1], [3]), run("c", [1], [3])
    foreign = run("d", [1], [3], prompts={0: (1,), 1: (2,)})
    assert alike([a, foreign, b, c]) == [[a, b, c]]
    assert alike([a, foreign]) == []
    other_model = run("d", [2], [3], model={"name": "tiny", "path": "/other"})
    assert alike([a, other_model]) == []


@pytest.mark.parametrize(
    ("match", "ratio", "lines"),
    [
        (None, None, []),
        (0.5, 0.6, []),
        (1.0, None, ["b against a: 1 of 2 completions are the same, not 1."]),
        (None, 0.95, ["b against a: 0.600 of its tokens/s, not 0.95."]),
        (
            0.75,
            2.0,
            ["b against a: 1 of 2 completions are the same, not 0.75.", "b against a: 0.600 of its tokens/s, not 2."],
        ),
    ],
)
def test_thresholds(match: float | None, ratio: float | None, lines: list[str]) -> None:
    found = compare(run("a", [1], [3]), run("b", [2], [3], speed=(6.0,)))
    assert command.missed_thresholds(found, match, ratio) == lines


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """The output of a sweep of two points, and their run directories."""
    out = tmp_path_factory.mktemp("runs")
    arguments = ["-m", "backend=dummy", "devices=1,2", "accelerator=cpu", f"output_dir={out}"]
    line = [sys.executable, "-m", "launcher", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    records = json.loads(done.stdout.splitlines()[-1])["records"]
    return done.stdout, [Path(record["run_dir"]) for record in records]


def test_sweep_ends_with_the_comparison(sweep: tuple[str, list[Path]]) -> None:
    stdout, _ = sweep
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in stdout.splitlines()]
    [found] = [row for row in rows if row[0] == "dummy x2" and "/" in row[1]]
    assert found[:5] == ["dummy x2", "4/4 (100%)", "none", "-", "no"]
    assert [row[:3] for row in rows if row[0].startswith("dummy x") and row[1].isdigit()] == [
        ["dummy x1", "0", "none"],
        ["dummy x2", "0", "none"],
        ["dummy x2", "1", "none"],
    ]


def edit(run_dir: Path, **changes: Any) -> None:
    record = json.loads((run_dir / "record.json").read_text())
    (run_dir / "record.json").write_text(json.dumps(record | changes))


def test_command(sweep: tuple[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = sweep[1]
    changed = Path(shutil.copytree(other, tmp_path / "changed"))
    rows = [json.loads(line) for line in (changed / "completions.jsonl").read_text().splitlines()]
    rows[2]["token_ids"][5] = 3
    (changed / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert command.main([str(base), str(other), "--min-match", "1.0"]) == 0
    printed = capsys.readouterr()
    assert ("dummy x1 (base)" in printed.out, printed.err) == (True, "")
    assert json.loads(printed.out.splitlines()[-1])["missed"] == []

    assert command.main([str(base), str(other), str(changed), "--json", "--min-match", "1.0"]) == 1
    printed = capsys.readouterr()
    [line] = printed.out.splitlines()
    found = json.loads(line)
    assert (found["base"], [one["match"] for one in found["comparisons"]]) == (str(base), [1.0, 0.75])
    [parted] = found["comparisons"][1]["divergences"]
    assert (parted["prompt"], parted["position"], parted["other_token"]) == (2, 5, 3)
    missed = f"changed against {base.name}: 3 of 4 completions are the same, not 1."
    assert (found["missed"], printed.err) == ([missed], f"missed: {missed}\n")
    assert {name: len(devices) for name, devices in found["devices"].items()} == {
        str(base): 1,
        str(other): 2,
        str(changed): 2,
    }


def test_what_cannot_be_compared_is_left_out_with_a_note(
    sweep: tuple[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [Path(shutil.copytree(run_dir, tmp_path / name)) for run_dir, name in zip(sweep[1], "ab", strict=True)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    paths = [*map(str, good), str(tmp_path / "empty"), str(tmp_path / "file")]
    assert command.main([*paths, "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["comparisons"]) == 1
    assert printed.err.splitlines() == [
        f"note: left out: {tmp_path / 'empty'} has no record.json.",
        f"note: left out: {tmp_path / 'file'} is a file, not the directory of a run.",
    ]
    assert command.main([*paths, "--min-match", "1"]) == 2, "a threshold is for all that were named"
    assert command.main([str(good[0]), str(tmp_path / "file")]) == 2
    assert "is a file, not the directory of a run. HINT: " in capsys.readouterr().err


def test_what_is_no_finished_run_is_refused_in_one_line(
    sweep: tuple[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sweep[1][0]
    names = ("nothing", "failed", "old", "torn", "short", "no_prompts", "list")
    bad = {name: Path(shutil.copytree(good, tmp_path / name)) for name in names}
    (bad["nothing"] / "record.json").unlink()
    edit(bad["failed"], status="oom")
    edit(bad["old"], schema_version=0)
    (bad["torn"] / "record.json").write_text("")
    (bad["short"] / "completions.jsonl").unlink()
    (bad["no_prompts"] / "prompts.jsonl").unlink()
    (bad["list"] / "record.json").write_text("[]")
    for name, expected in {
        "nothing": " has no record.json. HINT: python -m launcher.status runs, which names run directories",
        "failed": " did not finish: its status is oom. HINT: python -m launcher resume=true run_dir=",
        "old": "/record.json is not a valid file of a run: a record of schema version 0, and versions 1 to 2 are "
        "known. HINT: run it again",
        "torn": "/record.json is not valid JSON: Expecting value: line 1 column 1 (char 0). HINT: run it again",
        "short": " has 0 completions for 4 prompts. HINT: python -m launcher resume=true run_dir=",
    }.items():
        assert command.main([str(good), str(bad[name])]) == 2
        again = str(bad[name]) if expected.endswith("run_dir=") else ""
        assert capsys.readouterr() == ("", f"{bad[name]}{expected}{again}\n")
    for name in ("no_prompts", "list"):
        with pytest.raises(
            UserError,
            match=f"{name}/.* (is not a valid file of a run|is not valid JSON|cannot be read): .* HINT: run it again",
        ):
            read_finished(bad[name])
    assert command.main([str(good), str(tmp_path / "not there")]) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: RUN, RUN."),
        (["one"], "the following arguments are required: RUN."),
        (["a", "b", "--min-match", "most"], "argument --min-match: invalid share value: 'most'."),
        (["a", "b", "--min-match", "nan"], "argument --min-match: nan is not a share from 0 to 1."),
        (["a", "b", "--min-match", "2"], "argument --min-match: 2 is not a share from 0 to 1."),
        (["a", "b", "--min-speed-ratio", "inf"], "argument --min-speed-ratio: inf is not a ratio of 0 or more."),
    ],
)
def test_wrong_arguments(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert capsys.readouterr() == ("", f"{expected} HINT: python -m launcher.compare --help\n")
