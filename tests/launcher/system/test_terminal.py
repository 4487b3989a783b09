"""Commands whose output is full, closed or of a limited character set, and Ctrl-C at any time."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, Ended, environment, launcher, run

FULL = Path("/dev/full")
FULL_LINE = "Cannot write: No space left on device. HINT: make room, or let the output go elsewhere\n"
RUN = ("launcher", "backend=dummy", "devices=1", "measure.repeats=1")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The directory of a successful run."""
    ended = launcher(*RUN[1:], f"output_dir={tmp_path}")
    assert ended.code == 0, ended.err
    return Path(ended.last_json["run_dir"])


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["launcher", "--help"], RUN, ["launcher.plan", "model=falcon_40b"]])
def test_a_full_output_is_one_line(words: list[str], tmp_path: Path) -> None:
    with FULL.open("w") as out:
        ended = subprocess.run(
            [sys.executable, "-m", *words, *([f"output_dir={tmp_path}"] if words == RUN else [])],
            cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (2, FULL_LINE)


@pytest.mark.slow
def test_the_last_line_has_the_figures_of_the_record(run_dir: Path) -> None:
    ended = run([sys.executable, "-m", *RUN, f"output_dir={run_dir.parent}", "backend.step_s=0.0012345678"])
    record = json.loads(Path(ended.last_json["run_dir"], "record.json").read_text())
    for name in ("new_tokens_per_s", "ttft_s", "itl_s", "load_s"):
        assert ended.last_json[name] == pytest.approx(record[name], rel=1e-3)
        assert len(repr(ended.last_json[name]).partition(".")[2].lstrip("0")) <= 4


@pytest.mark.slow
def test_letters_that_are_orders_to_a_terminal_are_not_passed_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps("\x1b[31mred\x07\t\x9b2J"))
    prompts = ("prompts=file", f"prompts.path={tmp_path / 'a.jsonl'}")
    ended = run([sys.executable, "-m", *RUN, *prompts, f"output_dir={tmp_path}"])
    assert "\ufffd[31mred\ufffd \ufffd2J" in ended.out
    assert not {"\x1b", "\x07", "\x9b"} & set(ended.out)


@pytest.mark.slow
def test_letters_of_no_locale_are_kept_in_a_path(tmp_path: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = launcher(*RUN[1:], f"output_dir={tmp_path}/é", **locale)
    assert (ended.code, ended.err) == (0, "")
    [run_dir] = (tmp_path / "é").iterdir()
    assert f"output_dir={tmp_path}/é" in (run_dir / "command.sh").read_text(encoding="utf-8")


@pytest.mark.slow
def test_letters_that_an_output_has_not_are_replaced(run_dir: Path) -> None:
    ended = run([sys.executable, "-m", *RUN, f"output_dir={run_dir.parent}"], PYTHONIOENCODING="ascii")
    assert (ended.code, ended.err) == (0, "")
    assert "\ndummy ? tiny_falcon ? fp32 ? 1 device ? batch of 4\n" in ended.out
    ended = run([sys.executable, "-m", "launcher.compare", str(run_dir), str(run_dir)], PYTHONIOENCODING="ascii")
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.slow
def test_prompts_can_be_piped_into_all_points(tmp_path: Path) -> None:
    words = ["-m", "seed=1,2", "prompts=file", "prompts.path=-", f"output_dir={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-m", *RUN, *words], cwd=ROOT, env=environment(), input="one\n\ntwo é\n",
        stdout=subprocess.PIPE, encoding="utf-8", timeout=60, check=True,
    )  # fmt: skip
    for record in json.loads(ended.stdout.splitlines()[-1])["records"]:
        lines = Path(record["run_dir"], "prompts.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == ["one", "two é"]


def history(*words: str | Path) -> Ended:
    return run([sys.executable, "-m", "launcher.status", *map(str, words)])


@pytest.mark.slow
def test_a_folder_of_runs_is_its_history(run_dir: Path) -> None:
    runs = run_dir.parent
    refused = launcher(*RUN[1:], "-m", "sampling.max_new_tokens=5000,8", f"output_dir={runs}").last_json["records"][0]
    ended = history("--json", runs)
    assert (ended.code, ended.err, ended.last_json["points"]) == (1, "", {"ok": 2, "refused": 1})
    assert ended.out == json.dumps(ended.last_json) + "\n"
    starts = [row["started_at"] for row in ended.last_json["records"]]
    assert all(0 <= later - earlier < 600 for earlier, later in itertools.pairwise(starts))

    (runs / "torn").mkdir()
    (runs / "torn" / "record.json").write_text("{")
    (runs / "empty").mkdir()
    [of_the_sweep] = runs.glob("*_sweep")
    assert history(of_the_sweep).last_json["points"] == {"ok": 1, "refused": 1}
    ended = history(*sorted(set(runs.iterdir()) - {of_the_sweep}))
    assert (ended.code, ended.err) == (1, "")
    assert ended.last_json["points"] == {"ok": 2, "refused": 1, "unreadable": 2}
    assert f"\nempty: {runs / 'empty'} is not a run directory, and has none.\n" in ended.out
    assert f"\ntorn: {runs / 'torn' / 'record.json'} is not valid JSON: " in ended.out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ended.out.splitlines()]
    pairs = itertools.pairwise([row for row in rows if row] + [[""]])
    [row] = [row for row, after in pairs if run_dir.name in (row[0], row[0] + after[0])]  # the name may be wrapped
    assert row[2:7] == ["tiny_falcon", "dummy", "1", "4", "ok"]

    assert history(refused["run_dir"]).last_json["points"] == {"refused": 1}
    assert (history(runs / "empty").code, history(runs / "nowhere").code, history("--watch", runs).code) == (2, 2, 2)


@pytest.mark.parametrize("module", ["launcher", "launcher.plan", "launcher.status", "launcher.compare"])
def test_ctrl_c_while_importing_is_one_line(module: str, tmp_path: Path) -> None:
    for name in ("yaml", "rich"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    ended = run([sys.executable, "-m", module, "--help"], PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (ended.code, ended.out, ended.err) == (130, "", "interrupted\n")


WAIT_WHERE_A_FILE_IS_OPENED = """
import os, sys

def wait(event, arguments):
    if event == "open" and str(arguments[0]) == os.environ["WAIT_AT"]:
        with open(os.environ["FIFO"]) as fifo:
            fifo.read()

sys.addaudithook(wait)
"""


def interrupted(at: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that gets SIGINT while it opens the file `at`."""
    fifo = at.with_name("fifo")
    os.mkfifo(fifo)
    (at.parent / "sitecustomize.py").write_text(WAIT_WHERE_A_FILE_IS_OPENED)
    command = [sys.executable, "-m", *words]
    environ = environment(PYTHONPATH=f"{at.parent}:{ROOT}", WAIT_AT=str(at), FIFO=str(fifo))
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with fifo.open("w"):  # opening a FIFO returns when the command has opened it, too
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def test_ctrl_c_before_a_run_has_begun_is_one_line(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\n")
    ended = interrupted(prompts, *RUN, "prompts=file", f"prompts.path={prompts}", f"output_dir={tmp_path / 'runs'}")
    assert ended == (130, "", "interrupted\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ctrl_c_between_two_points_shows_those_that_are_done(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in (first, second):
        path.write_text("The capital of France is\n")
    paths = f"prompts.path={first},{second},{first}"
    code, out, err = interrupted(second, *RUN, "-m", "prompts=file", paths, f"output_dir={tmp_path / 'runs'}")
    assert (code, "Traceback" in err) == (1, False)
    assert json.loads(out.splitlines()[-1])["points"] == {"ok": 1, "cancelled": 2}


def on_a_disk(size: str, folder: Path, script: str) -> Ended:
    """Run a shell script with `folder` on a private file system of the given size."""
    mount = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size={size} tmpfs {folder} && {script}"]
    if shutil.which("unshare") is None or run([*mount[:-1], mount[-1].partition("&&")[0]]).code != 0:
        pytest.skip("no file system can be mounted here")
    return run(mount)


LAUNCH = f"{sys.executable} -m {' '.join(RUN)} output_dir"


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "48k"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(size: str, tmp_path: Path) -> None:
    room = f"mount -o remount,size=4m {tmp_path}"
    ended = on_a_disk(size, tmp_path, f"{LAUNCH}={tmp_path}/r; echo $?; {room}; {LAUNCH}={tmp_path}/r resume=true")
    assert (ended.out.partition("\n")[0], ended.code) == ("2", 0), ended.err
    [line] = ended.err.splitlines()
    assert line.startswith(f"Cannot write in {tmp_path}/r")
    assert line.endswith(": No space left on device. HINT: free some, then resume=true")


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_full_disk(tmp_path: Path) -> None:
    ended = on_a_disk("24k", tmp_path, f"{LAUNCH}={tmp_path}/r,{tmp_path.parent}/elsewhere -m")
    rows = ended.last_json["records"]
    assert [row["status"] for row in rows] == ["refused", "ok"], ended.err
    assert "No space left on device." in rows[0]["error"]["message"]


@pytest.mark.slow
def test_a_closed_output_under_torchrun_and_an_inspecting_interpreter_change_nothing(tmp_path: Path) -> None:
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=1 -m launcher"
    asked = f"backend=dummy prompts.texts=[a] output_dir={tmp_path}"
    ended = run(["/bin/sh", "-c", f"exec {start} {asked} >&-"])
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
    [record] = tmp_path.glob("*/record.json")
    assert json.loads(record.read_text())["status"] == "ok"
    ended = launcher("--version", PYTHONINSPECT="1")
    assert (ended.code, ended.err) == (0, "")
