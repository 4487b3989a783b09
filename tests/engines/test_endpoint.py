"""Real servers on the CPU, each started once: the tokens of plain transformers, by every way of sending requests."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running import ROOT, launcher, left_in_shared_memory, run

from launcher.backends.endpoint.backend import EndpointBackend
from launcher.composition.compose import compose_run
from launcher.prompts.prompts import encode, sampling_of
from launcher.results.comparison import compare
from launcher.run_dir.finished import read_finished
from launcher.version import __version__
from shards.machine.shared_memory import shared_memory_files
from shards.machine.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.base import Generation, Prompt
    from launcher.results.comparison import FinishedRun

pytestmark = pytest.mark.slow  # the shared fixtures take seconds

TEXTS = ROOT / "tests" / "ragged_prompts.txt"
SET = ("model=tiny_llama", "prompts=file", f"prompts.path={TEXTS}", "accelerator=cpu")
RAY = os.environ.get("RAY_PYTHON") or (sys.executable if find_spec("ray") else None)
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser;"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
"""Runs `vllm bench serve`, whose command does not start from the wheel for CPUs."""
WAYS = {
    "one by one": "load.concurrency=1",
    "eight at once": "load.concurrency=8",
    "all at once": "load.concurrency=null",
    "by Poisson": "load.request_rate=20",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of plain transformers, which has the correct answers."""
    folder = tmp_path_factory.mktemp("reference")
    ended = launcher("backend=transformers", *SET, f"output_dir={folder}", "measure.repeats=1", timeout=200)
    assert ended.code == 0, ended.err
    return read_finished(Path(ended.last_json["run_dir"]))


@dataclass(frozen=True)
class Running:
    """A running server, with the client that started it."""

    backend: EndpointBackend
    prompts: list[Prompt]

    @property
    def url(self) -> str:
        return self.backend.client.url

    def ask(self, way: str) -> Generation:
        config = self.backend.config = compose_run(["backend=endpoint", "server=none", *SET, WAYS[way]])
        return self.backend.generate(self.prompts, sampling_of(config), lambda tokens, finished=(): None)


@contextmanager
def started(folder: Path, *overrides: str) -> Iterator[Running]:
    """The server of `server=...`; checks on exit that nothing of it is left."""
    before = shared_memory_files()
    config = compose_run(["backend=endpoint", *SET, "devices=1", *overrides, f"run_dir={folder}", "resume=true"])
    config.model.path = str(ROOT / "launcher" / "models" / "tiny_llama")
    backend = EndpointBackend(config)
    backend.load(None, World(), lambda done, total: None)
    assert backend.started is not None
    try:
        yield Running(backend, encode(TEXTS.read_text().splitlines(), Path(config.model.path)))
    finally:
        backend.close()
    assert backend.started.pids() == []
    assert left_in_shared_memory(before) == []


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """vLLM's server over two devices."""
    with started(tmp_path_factory.mktemp("vllm"), "server=vllm", "devices=2") as running:
        yield running


def check_answers(generation: Generation, reference: FinishedRun) -> None:
    """Check that the answers have the reference's tokens, or its texts if the server returns no ids."""
    assert (generation.failures, len(generation.completions)) == ((), len(reference.completions))
    for completion in generation.completions:
        right = reference.completions[completion.index]
        if completion.text is None:
            assert completion.token_ids == right.token_ids
            assert completion.finish_reason == right.finish_reason
        else:
            assert completion.text == right.text
            assert completion.new_tokens in (right.new_tokens, right.new_tokens - 1), "EOS may count or not"
        assert completion.ttft_s is not None
        assert completion.e2el_s is not None
        assert 0 < completion.ttft_s <= completion.e2el_s


@pytest.mark.parametrize("way", WAYS)
def test_vllms_server_gives_the_tokens_of_the_reference(vllm: Running, reference: FinishedRun, way: str) -> None:
    generation = vllm.ask(way)
    check_answers(generation, reference)
    seen = generation.server
    assert seen is not None
    assert (seen.software, seen.dialect, seen.tokens_checked) == ("vllm 0.32.0", "vllm", "ids")
    assert (seen.retries, seen.read_otherwise) == (0, 0)
    assert (seen.send_lag_s is not None) == (way == "by Poisson")
    own = seen.own_metrics
    assert own["new_tokens"] == sum(completion.new_tokens for completion in generation.completions)
    assert own["cached_prompt_tokens"] == 0, "no prompt of an earlier call was found in the prefix cache"
    assert 0 < own["ttft_s"] < own["e2el_s"]


def test_a_run_against_vllms_server_compares_with_the_reference(
    vllm: Running, reference: FinishedRun, tmp_path: Path
) -> None:
    overrides = (f"backend.url={vllm.url}", "measure.repeats=2", "load.concurrency=8", f"output_dir={tmp_path}")
    ended = launcher("backend=endpoint", *SET, *overrides, timeout=200)
    assert ended.code == 0, ended.err
    finished = read_finished(Path(ended.last_json["run_dir"]))
    comparison = compare(reference, finished)
    assert comparison.divergences == ()
    assert comparison.serving_cost is None
    assert comparison.notes == ("the cost of serving is not known: the server has vllm 0.32.0",)
    assert finished.label == "endpoint (vllm 0.32.0)"
    serving = finished.serving
    assert serving is not None
    assert (serving.requests, serving.failures, serving.tokens_checked) == (40, {}, "ids")


def test_what_vllms_server_holds_is_told(vllm: Running) -> None:
    (device,) = vllm.backend.memory()
    assert device.device == "cpu"
    assert device.host_anonymous_bytes is not None
    assert device.host_anonymous_bytes > 100 * 2**20
    assert device.reasons["parameter_bytes"]


@pytest.mark.parametrize(
    "arguments",
    [
        "[]",
        pytest.param(
            "[--continuous-batching,--cb-num-blocks,'64',--cb-block-size,'32',--cb-max-batch-tokens,'256']",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one by one", "continuous batching"],
)
def test_the_server_of_transformers_gives_the_texts_of_the_reference(
    reference: FinishedRun, tmp_path: Path, arguments: str
) -> None:
    with started(tmp_path, "server=transformers", f"server.arguments={arguments}") as running:
        for way in WAYS:
            generation = running.ask(way)
            check_answers(generation, reference)
            assert generation.server is not None
            assert (generation.server.dialect, generation.server.tokens_checked) == ("transformers", "text")


@pytest.mark.slow
@pytest.mark.skipif(RAY is None, reason="Ray is not in the lock: RAY_PYTHON= an interpreter that has ray[llm]")
def test_ray_serve_gives_the_tokens_of_the_reference(reference: FinishedRun, tmp_path: Path) -> None:
    with started(tmp_path, "server=ray", f"server.python={RAY}") as running:
        for way in WAYS:
            generation = running.ask(way)
            check_answers(generation, reference)
            assert generation.server is not None
            assert (generation.server.dialect, generation.server.tokens_checked) == ("vllm", "ids")


def served(words: str) -> tuple[str, ...]:
    """The overrides that start an engine of this project as an HTTP server."""
    command = f"{{python}} -m launcher.serve {words} model=tiny_llama accelerator=cpu --port={{port}}"
    return "server=litserve", f"server.command='{command}'", "server.dialect=vllm"


@pytest.mark.slow
def test_a_peers_client_measures_an_engine_of_ours(reference: FinishedRun, tmp_path: Path) -> None:
    words = [
        "--backend", "openai", "--endpoint", "/v1/completions", "--model", "tiny_llama",
        "--tokenizer", str(ROOT / "launcher" / "models" / "tiny_llama"), "--dataset-name", "random",
        "--random-input-len", "8", "--random-output-len", "6", "--num-prompts", "12", "--max-concurrency", "4",
        "--ignore-eos", "--temperature", "0", "--goodput", "e2el:1e6", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "bench.json",
    ]  # fmt: skip
    with started(tmp_path, *served("backend=transformers devices=1")) as running:
        check_answers(running.ask("all at once"), reference)
        ended = run([sys.executable, "-c", BENCH, "--base-url", running.url, *words], timeout=200)
    assert ended.code == 0, ended.err[-2000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 6
    assert 0 < result["median_ttft_ms"] < result["duration"] * 1000
    assert result["median_tpot_ms"] > 0
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])


@pytest.mark.parametrize(
    ("engine", "devices"),
    [
        ("fsdp", 2),
        ("tensor_parallel", 2),
        pytest.param("vllm", 1, marks=pytest.mark.slow),
        pytest.param("fsdp measure.scheduling=static", 2, marks=pytest.mark.slow),
    ],
)
def test_engines_of_ours_are_served_with_their_tokens(
    reference: FinishedRun, tmp_path: Path, engine: str, devices: int
) -> None:
    with started(tmp_path, *served(f"backend={engine} devices={devices}")) as running:
        for way in ("all at once", "by Poisson"):
            generation = running.ask(way)
            check_answers(generation, reference)
            assert generation.server is not None
            assert (generation.server.tokens_checked, generation.server.read_otherwise) == ("ids", 0)
            assert generation.server.software == f"{engine.split(maxsplit=1)[0]}, launcher.serve {__version__}"
