"""Real DeepSpeed runs on two ranks: the reference's tokens, a share of the weights each, nothing left in /dev/shm."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from running import ROOT, Ended, command_line, environment, launcher, run

from launcher.backends.deepspeed.engine import DeepSpeedConfig
from launcher.backends.deepspeed.requirements import missing_compiler, missing_shared_memory
from launcher.backends.module import check_share
from launcher.config.schema import ConfigError, RunConfig
from launcher.run_dir.run_dir import RunDir
from launcher.system.processes import of_run
from shards.errors import PlanError
from shards.machine.shared_memory import SHARED_MEMORY

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPTS = ROOT / "tests" / "ragged_prompts.txt"
PLAIN = "backend.kernel_inject=false, which is tensor parallel with transformers' own layers"
FALCON = {"model_type": "falcon", "alibi": False}


def run_dir(ended: Ended) -> Path:
    assert ended.code == 0, ended.out[-2000:] + ended.err[-2000:]
    return Path(ended.last_json["run_dir"])


def tokens(folder: Path) -> dict[int, list[int]]:
    lines = (folder / "rank_0.completions.jsonl").read_text().splitlines()
    return {item["index"]: item["token_ids"] for item in map(json.loads, lines)}


def answer(tmp_path: Path, backend: str, model: str, *overrides: str, **environ: str) -> Path:
    """The run directory of a run with 20 ragged prompts in batches of 4."""
    prompts = ("prompts=file", f"prompts.path={PROMPTS}", "measure.repeats=1", "measure.warmup=0")
    ended = launcher(f"backend={backend}", f"model={model}", f"output_dir={tmp_path}", *prompts, *overrides, **environ)
    return run_dir(ended)


def segments() -> set[Path]:
    return set(SHARED_MEMORY.glob("deepspeed_allreduce_buffer_*"))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ignore_eos"), [("tiny_falcon", "false"), ("tiny_llama", "true")])
def test_two_ranks_give_the_tokens_of_the_reference(tmp_path: Path, model: str, ignore_eos: str) -> None:
    before = segments()
    reference = answer(tmp_path, "transformers", model, "devices=1", f"sampling.ignore_eos={ignore_eos}")
    cut = answer(tmp_path, "deepspeed", model, f"sampling.ignore_eos={ignore_eos}")
    assert tokens(cut) == tokens(reference)
    plan = json.loads((cut / "plan.json").read_text())
    for rank in range(2):
        [device] = json.loads((cut / f"rank_{rank}.json").read_text())["devices"]
        assert device["parameter_bytes"] == plan["devices"][rank]["parameter_bytes"]
        assert device["parameter_bytes"] <= 0.75 * plan["num_parameters"] * 4
        assert "all-reduce: shared memory" in (cut / f"rank_{rank}.log").read_text()
    assert segments() <= before


@pytest.mark.slow
def test_without_a_compiler_the_ranks_add_up_over_gloo(tmp_path: Path) -> None:
    nowhere = {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    cut = answer(tmp_path, "deepspeed", "tiny_llama", "precision=bf16", **nowhere)
    why = "no /nowhere/c++ here to compile its shared-memory all-reduce with (apt install g++)"
    assert f"all-reduce: gloo, since {why}" in (cut / "rank_1.log").read_text()
    [note] = json.loads((cut / "record.json").read_text())["notes"]
    assert note == f"DeepSpeed's ranks reduce over gloo, two to three times slower: {why}"


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run that takes minutes unless it is ended."""
    long = ("model=tiny_llama", "sampling.max_new_tokens=900", "sampling.ignore_eos=true", "measure.repeats=50")
    command = [sys.executable, "-m", "launcher", "backend=deepspeed", *long, f"output_dir={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    yield process
    if process.poll() is None:
        for member in (*psutil.Process(process.pid).children(recursive=True), process):
            member.kill()
    process.wait()


def generating(tmp_path: Path, rank: int) -> int:
    """Wait until a rank has generated some tokens; returns its process id."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        time.sleep(0.3)
        for path in tmp_path.glob(f"*/rank_{rank}.progress"):
            progress: dict[str, Any] = json.loads(path.read_text() or "{}")
            if progress.get("tokens", 0) > 20:
                return int(progress["pid"])
    raise AssertionError("the run did not begin to generate")


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_leaves_nothing(tmp_path: Path, long_run: subprocess.Popen[bytes]) -> None:
    before = segments()
    os.kill(generating(tmp_path, rank=1), signal.SIGKILL)
    assert long_run.wait(timeout=30) == 1
    [path] = tmp_path.glob("*/record.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["error"]["rank"]) == ("failed", 1)
    mark = RunDir(path.parent).mark
    assert of_run(mark) == []
    assert segments() <= before


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], bool, tuple[str, str] | None]] = {
    "plain": ({}, FALCON, False, None),
    "kernels for falcon": (
        {"kernel_inject": True}, FALCON, True,
        ("backend.kernel_inject=true: DeepSpeed has no kernels for falcon; it would silently replace and "
         "shard nothing.", PLAIN),
    ),
    "kernels on a CPU": (
        {"kernel_inject": True}, {"model_type": "llama"}, False,
        ("backend.kernel_inject=true: DeepSpeed's kernels for llama run on CUDA only.", PLAIN),
    ),
    "kernels under transformers 5": (
        {"kernel_inject": True}, {"model_type": "llama"}, True,
        ("backend.kernel_inject=true: DeepSpeed's layers for llama keep keys and values to themselves and return "
         "tuples, where transformers 5 looks for them in its own cache and takes tensors.", PLAIN),
    ),
    "a family on its list": (
        {}, {"model_type": "gpt2"}, False,
        ("DeepSpeed's AutoTP cannot be used for gpt2: DeepSpeed's own list excludes it.", "backend=fsdp, or devices=1"),
    ),
    "alibi": (
        {}, {"model_type": "falcon", "alibi": True}, False,
        ("DeepSpeed's AutoTP splits the heads of a Falcon but not its ALiBi slopes, one for each head.",
         "backend=fsdp, or devices=1"),
    ),
    "a limit that is too low": (
        {"max_out_tokens": 39}, FALCON, False,
        ("backend.max_out_tokens=39, and the longest prompt with its answer has 40.",
         "backend.max_out_tokens=40, or null for as long as needed"),
    ),
    "a limit that is enough": ({"max_out_tokens": 40}, FALCON, False, None),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_deepspeed_gets_wrong_is_refused(case: str) -> None:
    options, model_config, on_cuda, expected = REFUSALS[case]
    config = RunConfig(backend=DeepSpeedConfig(**options), devices=2)
    if expected is None:
        config.backend.refuse(config, model_config, on_cuda, longest=40)
        return
    with pytest.raises(ConfigError) as caught:
        config.backend.refuse(config, model_config, on_cuda, longest=40)
    assert (caught.value.fact, caught.value.hint) == expected


@pytest.mark.parametrize("model_config", [{"model_type": "gpt2"}, {"model_type": "falcon", "alibi": True}])
def test_one_device_cuts_nothing(model_config: dict[str, Any]) -> None:
    config = RunConfig(backend=DeepSpeedConfig(), devices=1)
    config.backend.refuse(config, model_config, False, longest=40)


@pytest.mark.slow
def test_a_refusal_is_one_line_and_exit_code_2() -> None:
    ended = command_line("backend=deepspeed", "backend.kernel_inject=true")
    assert ended.code == 2
    assert ended.err.strip() == f"{REFUSALS['kernels for falcon'][3][0]} HINT: {PLAIN}"  # type: ignore[index]


def test_shared_memory_that_may_not_be_used_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert missing_shared_memory(0) == "/dev/shm: Read-only file system"


def test_what_shared_memory_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_shared_memory(0) is None
    assert str(missing_shared_memory(10**6)).endswith("1000000 ranks need 66000008 (docker run --shm-size=1g)")
    monkeypatch.setenv("CXX", sys.executable)
    assert missing_compiler() is None


LOCKS = """
import os, sys, time
from pathlib import Path
from launcher.backends.deepspeed.all_reduce import ABANDONED_S, _abandoned
path = Path(sys.argv[1])
past = time.time() - ABANDONED_S - 1
with path.open("w"):
    os.utime(path, (past, past))
    print(_abandoned(path))
print(_abandoned(path))
path.touch()
print(_abandoned(path))
path.unlink()
print(_abandoned(path))
"""


@pytest.mark.slow
def test_a_lock_is_abandoned_when_it_is_old_and_nobody_has_it_open(tmp_path: Path) -> None:
    ended = run([sys.executable, "-c", LOCKS, str(tmp_path / "lock")])
    assert ended.out.split()[-4:] == ["False", "True", "False", "True"], ended.err


@pytest.mark.parametrize(
    ("held", "planned", "verdict"),
    [
        (505, 500, None),
        (1000, 1000, None),
        (1000, 500, "nothing was sharded"),
        (1000, 970, "nothing was sharded"),
        (300, 500, "it was sharded differently than planned"),
    ],
)
def test_a_rank_holds_its_share(held: int, planned: int, verdict: str | None) -> None:
    if verdict is None:
        check_share(0, held << 20, planned << 20, 1000 << 20, 0.05)
        return
    with pytest.raises(PlanError) as caught:
        check_share(0, held << 20, planned << 20, 1000 << 20, 0.05)
    fact = f"rank 0 holds {held}.0 MiB of 1000.0 MiB parameters, and its share is {planned}.0 MiB: {verdict}."
    assert caught.value.fact == fact
