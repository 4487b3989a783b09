"""Runs with a server that misbehaves or dies: the record, the saved answers, and leftover processes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from fake_server import SLOW_METRICS_S, FakeServer
from running import ROOT, Ended, launcher

from launcher.backends.endpoint.backend import EndpointBackend
from launcher.composition.compose import compose_run
from launcher.prepare.prepare import prepare
from launcher.run_dir.run_dir import RunDir
from shards.errors import UserError
from shards.machine.hardware import Device
from shards.machine.nvml import CardProcess, NvmlError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAKE = str(ROOT / "tests" / "helpers" / "fake_server.py")
SET = ("backend=endpoint", "prompts=synthetic", "prompts.input_tokens=4", "prompts.output_tokens=8")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def run(tmp_path: Path, *overrides: str, **environment: str) -> tuple[Ended, RunDir]:
    ended = launcher(*SET, *overrides, f"output_dir={tmp_path}", "measure.repeats=2", **environment)
    assert "Traceback" not in ended.err
    return ended, RunDir(Path(ended.last_json["run_dir"]))


@pytest.mark.slow
def test_failed_requests_are_counted_named_and_kept(server: FakeServer, tmp_path: Path) -> None:
    ended, run_dir = run(tmp_path, f"backend.url={server.url('some_busy')}", "prompts.count=40", "load.concurrency=4")
    assert ended.code == 0, ended.err
    record = run_dir.read_record()
    assert record is not None
    assert record.metrics is not None
    serving = record.metrics.serving
    assert serving is not None
    completions = run_dir.read_completions()
    failed = [item for item in completions if item.failure is not None]
    assert len(completions) == 40
    assert 0 < len(failed) < 40
    assert {item.finish_reason for item in failed} == {"failed"}
    assert all(item.failure == "http_429: " + BUSY for item in failed)
    assert serving.failures == {"http_429": 2 * len(failed)}
    assert (serving.requests, serving.retries, serving.tokens_checked) == (80, 0, "ids")
    assert record.totals is not None
    assert (record.totals.prompts, record.totals.new_tokens) == (40 - len(failed), 8 * (40 - len(failed)))
    assert record.partial is None
    assert f"{2 * len(failed)} " in ended.out
    assert "of 80" in ended.out


BUSY = '{"error": {"message": "not you, None"}}'


@pytest.mark.slow
def test_random_tokens_need_nothing_of_the_model_but_its_vocabulary(server: FakeServer, tmp_path: Path) -> None:
    ended, run_dir = run(tmp_path, f"backend.url={server.url('ok')}", "model=llama2_7b", "prompts.count=4")
    assert ended.code == 0, ended.err
    assert [item.text for item in run_dir.read_completions()] == [""] * 4


@pytest.mark.slow
def test_the_time_of_a_repeat_is_that_of_its_requests(server: FakeServer, tmp_path: Path) -> None:
    ended, run_dir = run(tmp_path, f"backend.url={server.url('slow_metrics')}", "prompts.count=4", "measure.warmup=0")
    assert ended.code == 0, ended.err
    record = run_dir.read_record()
    assert record is not None
    assert record.metrics is not None
    assert record.metrics.wall_s.max is not None
    assert record.metrics.wall_s.max < 2 * SLOW_METRICS_S, "the server's own metrics are asked for beside it"


@pytest.mark.slow
def test_a_run_of_failures_is_a_failure(server: FakeServer, tmp_path: Path) -> None:
    ended, run_dir = run(tmp_path, f"backend.url={server.url('breaks_later')}", "prompts.count=3")
    assert ended.code == 1
    record = run_dir.read_record()
    assert record is not None
    assert record.error is not None
    assert record.status == "failed"
    assert record.error.message.startswith("all 3 requests failed, the first by http_500: ")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "backend=endpoint needs a server. HINT: backend.url=http://127.0.0.1:8000, or server=vllm"),
        (["backend.url=127.0.0.1:80"], "backend.url=127.0.0.1:80 is not an address. HINT: "),
        (["backend.url=http://a:port"], "backend.url=http://a:port is not an address. HINT: "),
        (["backend.url=http://me:secret@127.0.0.1:80"], "backend.url contains more than an address"),
        (["backend.url='http://127.0.0.1:80/?key=secret'"], "backend.url contains more than an address"),
        (["backend.url=http://a", "backend.key_variable=NO_SUCH"], "There is no $NO_SUCH in the environment. HINT: "),
        (["backend.url=http://a", "server=vllm"], "server=vllm starts a server, and backend.url=http://a has one. "),
        (["backend.url=http://a", "backend.dialect=openai"], "prompts=synthetic are token ids, and dialect=openai "),
        (
            ["backend.url=http://a", "backend.dialect=tgi", "prompts=seed", "sampling.ignore_eos=true"],
            "dialect=tgi cannot",
        ),
        (["backend.url=http://a", "load.concurrency=9999999"], "load.concurrency=9999999, and a process may open "),
        (
            ["backend.url=http://a", "load.concurrency=4", "load.request_rate=1"],
            "load.concurrency and load.request_rate ",
        ),
        (
            ["backend.url=http://a", "load.arrivals=true", "prompts=seed"],
            "load.arrivals=true, and prompts=seed has no",
        ),
        (
            ["backend=dummy", "load.concurrency=4"],
            "backend=dummy is given batches, and does not use load.concurrency. ",
        ),
        (
            ["backend=dummy", "server=vllm"],
            "backend=dummy calls no server, but server=vllm starts one. HINT: server=none",
        ),
        (["server=litserve", "prompts=seed"], 'server=litserve has no command of its own. HINT: "server.command='),
        (["server=vllm", "server.command='a {what}'"], "server.command has {what}, which is not known. HINT: {"),
        (["server=vllm", 'server.command="a \'b"'], "server.command cannot be read: No closing quotation. HINT: "),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_process_starts(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(compose_run(["backend=endpoint", "prompts=synthetic", "devices=1", *overrides]), ())
    assert str(caught.value).startswith(words)
    assert "secret" not in str(caught.value)


def test_the_ceilings_are_those_of_the_machine_that_is_named() -> None:
    asked = ["backend=endpoint", "backend.url=http://a", "prompts=synthetic", "load.concurrency=8"]
    run = prepare(compose_run([*asked, "machine=2xa6000"]), ())
    assert (run.num_devices, run.world_size, run.on_cuda) == (2, 1, False)
    assert run.notes[-1].startswith("ceilings of machine=2xa6000, 8 prompts at a time: ")
    ours = prepare(
        compose_run(["backend=vllm", "machine=2xa6000", "backend.max_num_seqs=8", *asked[2:3], "dry_run=true"]), ()
    )
    assert ours.plan is not None
    assert ours.plan.limit is not None
    assert run.paces["vllm"] == pytest.approx(ours.paces["vllm"])
    assert prepare(compose_run(asked), ()).paces == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backend.url=http://127.0.0.1:1"], "Nobody answers at http://127.0.0.1:1: "),
        (["backend.url={breaks}"], "does not answer as vllm or openai or transformers: http_500, "),
        (
            ["backend.url={ok}", "prompts=seed"],
            "The server makes 23 tokens of prompt 0, and the tokenizer here makes ",
        ),
        (["server=vllm", "server.command='/no/such/program {port}'"], "Cannot start /no/such/program: No such file"),
        (["server=vllm", "server.command=/bin/true"], "the server ended with exit code 0; its last lines: nothing"),
    ],
)
def test_a_server_that_is_of_no_use_is_one_line(
    server: FakeServer, tmp_path: Path, overrides: list[str], words: str
) -> None:
    filled = [item.replace("{ok}", server.url("ok")).replace("{breaks}", server.url("breaks")) for item in overrides]
    ended = launcher("backend=endpoint", "prompts=synthetic", *filled, f"output_dir={tmp_path}", "devices=1")
    assert ended.code in (1, 2)
    assert words in ended.err
    assert "Traceback" not in ended.err


def test_what_a_server_holds_on_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Device(f"card {number}", uuid=f"GPU-{number}") for number in range(4)]
    users = {
        "GPU-0": (CardProcess(10, 700), CardProcess(11, 20), CardProcess(99, 5)),
        "GPU-1": (CardProcess(99, 5),),
        "GPU-2": (CardProcess(11, None),),
    }

    def processes(uuid: str) -> tuple[CardProcess, ...]:
        if uuid == "GPU-3":
            raise NvmlError("Insufficient Permissions")
        return users[uuid]

    monkeypatch.setattr("launcher.backends.endpoint.backend.cuda_devices", lambda environ: cards)
    monkeypatch.setattr("shards.machine.nvml.processes", processes)
    backend = EndpointBackend(compose_run(["backend=endpoint", "server=vllm", "devices=4", "accelerator=cuda"]))
    started: Any = SimpleNamespace(pids=lambda: [10, 11], anonymous_bytes=lambda: 3000, close=lambda: None)
    backend.started = started
    held = backend.memory()
    backend.close()
    assert [one.nvml_used_bytes for one in held] == [720, None, None, None]
    assert [one.host_anonymous_bytes for one in held] == [3000, None, None, None], "of the host once"
    hidden = "NVML does not show the server's processes (another PID namespace?)"
    reasons = [one.reasons.get("nvml_used_bytes") for one in held]
    assert reasons == [None, hidden, hidden, "NVML: Insufficient Permissions"]


@pytest.mark.slow
def test_a_key_is_written_nowhere(server: FakeServer, tmp_path: Path) -> None:
    key = "sk-1234567890"
    overrides = (f"backend.url={server.url('some_busy')}", "prompts.count=20", "backend.key_variable=MY_KEY")
    ended, run_dir = run(tmp_path, *overrides, MY_KEY=key)
    assert ended.code == 0, ended.err
    assert server.seen[-1].headers["authorization"] == f"Bearer {key}"
    assert any(item.failure and "not you, Bearer ***" in item.failure for item in run_dir.read_completions())
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) > 5
    assert not any(key.encode() in text for text in texts)
    assert key not in ended.out + ended.err


@contextmanager
def fake_process(port: int = 0, step_s: float = 0.02) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A fake server in a separate process, and its port."""
    process = subprocess.Popen([sys.executable, FAKE, str(port), str(step_s)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_that_is_killed_fails_the_run_which_goes_on_later(tmp_path: Path) -> None:
    more = ("prompts.count=60", "load.concurrency=4", "measure.warmup=0", "resume=true")
    with fake_process() as (process, port):
        url = f"backend.url=http://127.0.0.1:{port}/ok"
        ended, run_dir = run_while(tmp_path, process.kill, url, *more)
    assert ended.code == 1
    record = run_dir.read_record()
    assert record is not None
    assert record.error is not None
    assert (record.status, record.error.stage) == ("failed", "repeat 1/2 batch 1/1")
    assert f"http://127.0.0.1:{port}/ok has ended" in record.error.message
    kept = run_dir.read_completions()
    assert 0 < len(kept) < 60
    assert not any(item.failure for item in kept)
    with fake_process(port):
        ended, same = run(tmp_path, url, *more)
    assert ended.code == 0, ended.err
    assert same == run_dir
    completions = run_dir.read_completions()
    assert [item.index for item in completions] == list(range(60))
    assert [item for item in completions if item.index in {row.index for row in kept}] == kept
    assert all(item.new_tokens == 8 for item in completions)


@pytest.mark.slow
def test_a_started_server_that_is_killed_is_started_again_by_a_resumed_run(tmp_path: Path) -> None:
    mark = f"--marked={tmp_path}"
    own = ("server=vllm", f"server.command='{sys.executable} {FAKE} {{port}} 0.02 {mark}'", "server.cpu_arguments=")
    more = ("prompts.count=60", "load.concurrency=4", "measure.warmup=0", "resume=true", "devices=1", "accelerator=cpu")

    def kill() -> None:
        for one in psutil.process_iter(["cmdline"]):
            if mark in (one.info["cmdline"] or []):
                one.kill()

    ended, run_dir = run_while(tmp_path, kill, *own, *more)
    assert ended.code == 1
    record = run_dir.read_record()
    assert record is not None
    assert record.error is not None
    assert (record.status, record.error.stage) == ("failed", "repeat 1/2 batch 1/1")
    assert "the server ended with exit code -9" in record.error.message
    kept = run_dir.read_completions()
    assert 0 < len(kept) < 60
    assert not any(item.failure for item in kept)
    ended, same = run(tmp_path, *own, *more)
    assert (ended.code, same) == (0, run_dir), ended.err
    assert [item.index for item in run_dir.read_completions()] == list(range(60))


def run_while(tmp_path: Path, act: Callable[[], None], *overrides: str) -> tuple[Ended, RunDir]:
    """Start a run, and call `act` when it has saved its first answers."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, tmp_path, *overrides)
        end = monotonic() + 100
        while not any(path.stat().st_size for path in tmp_path.glob("*/rank_0.completions.jsonl")):
            assert not running.done(), running.result()
            assert monotonic() < end
            sleep(0.05)
        act()
        return running.result()


@pytest.mark.slow
def test_a_server_is_started_for_the_run_and_ended_with_it(tmp_path: Path) -> None:
    own_mark = f"--marked={tmp_path}"
    own = f"server.command='{sys.executable} {FAKE} {{port}} 0.001 {own_mark}'"
    ended, run_dir = run(tmp_path, "server=vllm", own, "server.cpu_arguments=", "prompts.count=4", "devices=1")
    assert ended.code == 0, ended.err
    record = run_dir.read_record()
    assert record is not None
    assert record.devices[0].host_anonymous_bytes is not None
    assert record.devices[0].host_anonymous_bytes > 2**20
    assert any(note.startswith("server: SPT_NOENV=1 ") for note in record.notes)
    assert run_dir.rank(0).server_log.read_text().strip().isdecimal(), "what it printed"
    assert not [one for one in psutil.process_iter(["cmdline"]) if own_mark in (one.info["cmdline"] or [])]
