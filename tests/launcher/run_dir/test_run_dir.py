"""The run directory: written files can be read back, and invalid ones are refused in one line."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from described import described
from plans import plan
from running import ROOT

from launcher.backends.base import Prompt
from launcher.results.completions import ReportedCompletion, Saved, SavedCompletion
from launcher.run_dir.run_dir import RunDir, run_dirs_in
from shards.errors import UserError

NAME = re.compile(
    r"(run|plan|record|attempt|saved|notes)\.json|(prompts|completions|repeats)\.jsonl|command\.sh"
    r"|launch\.log|rank_[*{0-9]|slurm\.log|slurm_job|submit\.sbatch"
)


def texts(path: Path) -> list[str]:
    """The string constants of a module, without docstrings."""
    tree = ast.parse(path.read_text())
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documents]
    return [node.value for node in found if isinstance(node.value, str)]


def test_no_other_module_names_a_file_of_a_run() -> None:
    own = ROOT / "launcher" / "run_dir"
    modules = [path for path in (ROOT / "launcher").rglob("*.py") if own not in path.parents]
    named = {str(path.relative_to(ROOT)): [t for t in texts(path) if NAME.search(t)] for path in modules}
    assert {name: strings for name, strings in named.items() if strings} == {}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    prompts = [Prompt(0, "a", (1, 2)), Prompt(1, "\u2028", (3,))]
    completion = SavedCompletion(0, (7, 8), "stop", (0.5, 0.25))
    reported = ReportedCompletion(0, "a", "\u2028 b", (7,), 1, 1, "length")
    run, planned = described(world_size=2, on_cuda=True, notes=("n",)), plan(windows=(None, 4))
    run_dir.write_run(run)
    run_dir.write_plan(planned)
    run_dir.write_prompts(prompts)
    run_dir.rank(1).append_completions([completion])
    run_dir.write_completions([reported])
    run_dir.write_saved(Saved((completion,), (0, 2)))
    run_dir.write_attempt(3, ["python"])
    run_dir.write_notes(["note"])
    run_dir.write_job("7_1")
    assert run_dir.read_run() == run
    assert run_dir.read_plan() == planned
    assert run_dir.read_prompts() == prompts
    assert list(run_dir.read_rank_completions([0, 1])) == [completion]
    assert run_dir.read_completions() == [reported]
    assert run_dir.read_saved() == Saved((completion,), (0, 2))
    assert (run_dir.read_attempt(), run_dir.read_notes(), run_dir.read_job()) == (3, ["note"], "7_1")
    assert run_dirs_in(tmp_path) == [run_dir]


def test_an_empty_directory_says_so(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert (run_dir.read_record(), run_dir.read_plan(), run_dir.read_job()) == (None,) * 3
    assert run_dir.rank(0).read_result() is None
    assert (run_dir.read_completions(), run_dir.read_saved(), run_dir.read_attempt()) == ([], Saved(), 0)
    with pytest.raises(UserError, match=r"has no run\.json: no run was begun there"):
        run_dir.read_run()


READERS: dict[str, Callable[[RunDir], object]] = {
    "run.json": RunDir.read_run,
    "plan.json": RunDir.read_plan,
    "prompts.jsonl": RunDir.read_prompts,
    "record.json": RunDir.read_record,
    "completions.jsonl": RunDir.read_completions,
    "attempt.json": RunDir.read_attempt,
    "saved.json": RunDir.read_saved,
    "notes.json": RunDir.read_notes,
    "rank_0.json": lambda run_dir: run_dir.rank(0).read_result(),
    "rank_0.repeats.jsonl": lambda run_dir: run_dir.read_repeats([0]),
    "rank_0.completions.jsonl": lambda run_dir: list(run_dir.read_rank_completions([0])),
}
DAMAGES = {
    "other type": b'{"attempt": "1", "world_size": "x", "index": "x", "number": "x", "completions": 1}\n',
    "list": b"[1]\n",
    "number": b"1\n",
    "torn": b'{"a": \n',
    "no UTF-8": b'{"a": "\xff"}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_of_a_run_is_refused_in_one_line(name: str, damage: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(DAMAGES[damage])
    with pytest.raises(UserError) as caught:
        READERS[name](RunDir(tmp_path))
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path / name}")
    assert re.search(r"(is not valid JSON: |is not a valid file of a run: ).* HINT: ", line)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    for name, read in READERS.items():
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="cannot be read: it is a folder"):
            read(RunDir(tmp_path))


def test_a_run_without_a_command_has_no_script() -> None:
    assert described(command=()).script is None
    assert "exec " in (described(command=("python", "-m", "launcher", "resume=true", "a='b c'")).script or "")
    assert "resume" not in (described(command=("python", "-m", "launcher", "resume=true")).script or "")
