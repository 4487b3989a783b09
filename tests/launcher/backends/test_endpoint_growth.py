"""Ten thousand requests, 64 at a time, to a server in a separate process: memory does not grow with the requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running import ROOT, launcher, run

from launcher.run_dir.finished import read_finished

if TYPE_CHECKING:
    from collections.abc import Iterator

FAKE = str(ROOT / "tests" / "helpers" / "fake_server.py")
PROGRAM = str(ROOT / "tests" / "programs" / "endpoint_growth_program.py")
MIB = 2**20


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, FAKE, "0", "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}/ok"
    process.kill()
    process.wait()


@pytest.mark.slow
def test_the_memory_of_the_client_does_not_grow_with_requests(url: str) -> None:
    ended = run([sys.executable, PROGRAM, url], 280, forks=False)  # a fork's memory grows as it writes to shared pages
    assert ended.code == 0, ended.err[-3000:]
    held = ended.last_json
    assert len(held) == 10
    assert held[-1] - held[4] <= MIB, [value // MIB for value in held]


@pytest.mark.slow
def test_every_answer_is_kept(url: str, tmp_path: Path) -> None:
    sizes = ("prompts.count=10000", "prompts.input_tokens=4", "prompts.output_tokens=4", "load.concurrency=64")
    more = ("measure.repeats=1", "measure.warmup=0", f"output_dir={tmp_path}")
    ended = launcher("backend=endpoint", f"backend.url={url}", "prompts=synthetic", *sizes, *more, timeout=280)
    assert ended.code == 0, ended.err
    finished = read_finished(Path(ended.last_json["run_dir"]))
    assert sorted(finished.completions) == list(range(10_000))
    for index, completion in finished.completions.items():
        last = finished.prompts[index][-1]
        assert completion.token_ids == tuple((last + step) % 256 for step in range(1, 5)), "the server counts on"
