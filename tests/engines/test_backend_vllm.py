"""The vllm backend: arguments, workers and their memory, ranks started by torchrun, and a worker that dies."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from running import ROOT, launcher, left_in_shared_memory, run, torchrun

from launcher.backends.base import Generation
from launcher.backends.vllm.engine import VllmConfig
from launcher.backends.vllm.options import arguments, environment, refusal
from launcher.composition.compose import compose_run
from launcher.config.schema import RunConfig
from launcher.models import EMBEDDED
from launcher.prompts.prompts import encode
from launcher.run_dir.run_dir import RunDir
from launcher.system.processes import of_run
from shards.engines.vllm import VllmPlanner
from shards.machine.shared_memory import shared_memory_files
from shards.model.known_shape import known_shape
from shards.plan.memory import make_layout
from shards.plan.request import PlanRequest

pytestmark = pytest.mark.slow  # every test starts engines in separate processes

PROGRAM = str(ROOT / "tests" / "programs" / "vllm_program.py")
PROMPTS = (ROOT / "tests" / "ragged_prompts.txt").read_text().splitlines()
FOLDER = EMBEDDED / "tiny_falcon"
FIELDS = json.loads((FOLDER / "config.json").read_text())
WAYS = ("alone", "workers", "torchrun")
SIZES = {"alone": 1, "workers": 2, "torchrun": 2}
THREADS = "64"
PLANNED_POOL = 50_000_000  # POOL_BYTES of the program, which it uses with several workers


def test_a_refusal_names_the_argument() -> None:
    pydantic = pytest.importorskip("pydantic")
    with pytest.raises(ValueError, match="load_format") as caught:
        pydantic.create_model("LoadConfig", load_format=int)(load_format="foo")
    assert refusal(caught.value).startswith("load_format: Input should be a valid integer")
    assert refusal(ValueError("no")) == "no"


@cache
def attempt(way: str) -> tuple[list[dict[str, Any]], list[str], str]:
    """The program's observations by one process, by one with two workers, or by two ranks; files it left; its error."""
    before = shared_memory_files()
    with TemporaryDirectory() as out, TemporaryDirectory() as scratch:
        command = [PROGRAM, str(SIZES[way]), out]
        if way == "torchrun":
            ended = torchrun(2, *command, TMPDIR=scratch)
        else:
            command += ["kill"] if way == "workers" else []
            ended = run([sys.executable, *command], TMPDIR=scratch, OMP_NUM_THREADS=THREADS)
        shared = left_in_shared_memory(before)
        kept = ("torchelastic", "torchinductor")  # the logs of torchrun, and torch's cache of compiled code
        own = [name for name in os.listdir(scratch) if not name.startswith(kept)]
        left = sorted([*shared, *own])
        found = [json.loads(file.read_text()) for file in sorted(Path(out).iterdir())]
        return found, left, ended.err[-3000:] if ended.code else ""


def seen(way: str) -> list[dict[str, Any]]:
    """The observations of each process of the program."""
    pytest.importorskip("vllm", exc_type=ImportError)
    found, _, failure = attempt(way)
    assert not failure, failure
    return found


def config(*overrides: str) -> RunConfig:
    return compose_run(["backend=vllm", "model=tiny_falcon", "accelerator=cpu", *overrides])


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_tokens_in_the_order_asked_for(way: str) -> None:
    expected = {item["index"]: item["token_ids"] for item in seen("alone")[0]["calls"][0]["completions"]}
    for rank in seen(way):
        backwards, forwards = (call["completions"] for call in rank["calls"])
        assert [item["index"] for item in backwards] == list(range(len(PROMPTS)))[::-1]
        assert [item["index"] for item in forwards] == list(range(len(PROMPTS)))
        assert {item["index"]: item["token_ids"] for item in backwards} == expected
        assert {item["index"]: item["token_ids"] for item in forwards} == expected
        assert rank["empty"] == json.loads(json.dumps(asdict(Generation(()))))
        assert rank["progress"] == [1, 1]


def test_prompts_that_come_one_by_one_have_the_same_tokens() -> None:
    alone = seen("alone")[0]
    expected = {item["index"]: item["token_ids"] for item in alone["calls"][0]["completions"]}
    for call in alone["paced"].values():
        assert {item["index"]: item["token_ids"] for item in call["completions"]} == expected
        assert all(0 < item["ttft_s"] <= call["wall_s"] for item in call["completions"])
    assert max(alone["paced"]["three"]["steps"]) == 3, "a step gives each prompt that is being answered a token"


@pytest.mark.parametrize("way", WAYS)
def test_each_token_has_its_moment_within_the_call(way: str) -> None:
    for call in (call for rank in seen(way) for call in rank["calls"]):
        assert sum(call["steps"]) == 40 * len(PROMPTS)
        for item in call["completions"]:
            assert len(item["itl_s"]) == len(item["token_ids"]) - 1 == 39
            assert min(item["itl_s"]) >= 0
            assert 0 < item["ttft_s"] + sum(item["itl_s"]) < call["wall_s"]
            assert item["finish_reason"] == "length"


@pytest.mark.parametrize("way", WAYS)
def test_memory_of_each_worker_is_its_share_exactly(way: str) -> None:
    size = SIZES[way]
    shape = known_shape(FIELDS)
    layout = make_layout(PlanRequest(shape=shape, engine=VllmPlanner(), devices=size, dtype_bytes=4))
    block = 32 * shape.kv_values_per_token() // size * 4
    blocks = sum(-(-(len(prompt.token_ids) + 40 - 1) // 32) for prompt in encode(PROMPTS, FOLDER))
    pool = PLANNED_POOL if size > 1 else 64 * 1024 * block // 32
    devices = [device for rank in seen(way) for device in rank["memory"]]
    assert [device["rank"] for device in devices] == list(range(size))
    for device in devices:
        assert device["parameter_bytes"] == layout.parameter_bytes[device["rank"]]
        assert device["kv_cache_bytes"] == blocks * block
        assert device["kv_cache_reserved_bytes"] == pool // block * block
        assert device["host_anonymous_bytes"] > device["kv_cache_reserved_bytes"]
        unread = {"tensor_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "nvml_used_bytes"}
        assert set(device["reasons"]) == unread | {"phases", "fragmented_bytes", "step_growth_bytes"}
        assert all(device[name] is None for name in unread)


def test_workers_share_the_cores() -> None:
    share = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert seen("workers")[0]["threads"] == [share, share]


def test_arguments_that_vllm_does_not_have_are_named() -> None:
    saw = seen("alone")[0]
    assert (
        saw["refused"] == "vLLM has no argument 'max_num_seq' (backend.extra.max_num_seq). HINT: backend.max_num_seqs=2"
    )
    assert saw["ours"] == "backend.extra.dtype is set by the launcher. HINT: precision="
    assert saw["too_long"].startswith("Prompt 0 has 1000 tokens; 40 new ones do not fit into the 1024 that")


def test_a_lost_worker_is_named_within_seconds() -> None:
    killed = seen("workers")[0]["killed"]
    assert "rank 1 with exit code -9" in killed["message"]
    assert killed["after_s"] < 25


@pytest.mark.parametrize("way", WAYS)
def test_close_leaves_nothing_behind(way: str) -> None:
    assert seen(way)
    assert attempt(way)[1] == []


def test_arguments_of_a_run() -> None:
    run_config = config(
        "precision=bf16", "seed=3", "backend.max_num_seqs=8", "+backend.extra={block_size: 32, max_model_len: 99}"
    )
    run_config.model.path = str(FOLDER)
    found = arguments(run_config, FOLDER, external=False, on_cpu=True, pool=64 * 2**20)
    assert found == {
        "model": str(FOLDER),
        "tensor_parallel_size": 2,
        "dtype": "bfloat16",
        "seed": 3,
        "trust_remote_code": False,
        "load_format": "auto",
        "max_model_len": 99,
        "gpu_memory_utilization": 0.92,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "worker_extension_cls": "launcher.backends.vllm.worker.WorkerMemory",
        "kv_cache_memory_bytes": 64 * 2**20,
        "max_num_seqs": 8,
        "block_size": 32,
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.weights=random"], {"load_format": "dummy"}),
        (["backend.load_format=sharded_state"], {"load_format": "sharded_state"}),
        (["backend.enforce_eager=false"], {"enforce_eager": False}),
        (["backend.distributed_executor_backend=ray"], {"distributed_executor_backend": "ray"}),
        (["num_nodes=2"], {"tensor_parallel_size": 4, "distributed_executor_backend": "external_launcher"}),
        (["model.trust_remote_code=true"], {"trust_remote_code": True}),
        (["backend.gpu_memory_utilization=0.5"], {"gpu_memory_utilization": 0.5}),
    ],
)
def test_options_reach_vllm(overrides: list[str], expected: dict[str, Any]) -> None:
    found = arguments(config(*overrides), FOLDER, external="num_nodes=2" in overrides, on_cpu=True, pool=None)
    assert {name: found.get(name) for name in expected} == expected


def pool_bytes(config: RunConfig, fields: dict[str, Any], on_cpu: bool) -> int | None:
    assert isinstance(config.backend, VllmConfig)
    return config.backend.pool_bytes(config, fields, on_cpu)


def test_on_gpus_vllm_decides_itself() -> None:
    assert pool_bytes(config(), FIELDS, on_cpu=False) is None
    found = arguments(config(), FOLDER, external=False, on_cpu=False, pool=None)
    assert "kv_cache_memory_bytes" not in found
    assert found["enforce_eager"] is False
    assert set(environment(config("devices=2"), on_cpu=False)) == {
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
        "DO_NOT_TRACK",
        "SPT_NOENV",
    }


FORKING = """
import sys, types, torch
def asked(*_): raise AssertionError("CUDA was asked before vLLM forked its workers")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = asked
sys.modules["vllm"] = types.SimpleNamespace(LLM=object)
from launcher.backends.vllm.backend import VllmBackend
from launcher.composition.compose import compose_run
for accelerator in ("cuda", "cpu"):
    print(VllmBackend(compose_run(["backend=vllm", "model=tiny_falcon", f"accelerator={accelerator}"])).on_cpu)
"""


def test_nothing_of_cuda_is_touched_before_vllm_forks() -> None:
    ended = run([sys.executable, "-c", FORKING])
    assert (ended.code, ended.out.split()) == (0, ["False", "True"]), ended.err


SPAWN_BECOMES_FORK = """
import multiprocessing
real = multiprocessing.get_context
def get_context(method=None):
    print("asked for", method, flush=True)
    return real("fork" if method == "spawn" else method)
multiprocessing.get_context = get_context
"""


def test_an_engine_core_that_is_forked_as_on_cuda_ends_without_its_rank(tmp_path: Path) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    (tmp_path / "sitecustomize.py").write_text(SPAWN_BECOMES_FORK)  # on a CPU vLLM always spawns
    out = tmp_path / "runs"
    paths = f"{ROOT}{os.pathsep}{tmp_path}"
    ended = launcher(
        "backend=vllm", "devices=1", "accelerator=cpu", "measure.repeats=1", f"output_dir={out}",
        PYTHONPATH=paths, VLLM_ENABLE_V1_MULTIPROCESSING="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    [run_dir] = out.iterdir()
    assert "asked for spawn" in (run_dir / "rank_0.log").read_text()
    assert (ended.code, ended.last_json["status"]) == (0, "ok"), ended.err
    assert of_run(RunDir(run_dir).mark) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["backend.kv_cache_memory_bytes=12345"], 12345),
        (["backend.kv_cache_memory_bytes=12345", "+backend.extra={kv_cache_memory_bytes: 678}"], 678),
        (["devices=1", "backend.max_num_seqs=256"], 256 * 1024 * 2048),
        (["devices=1", "+backend.extra={max_num_seqs: 128, max_model_len: 512}"], 128 * 512 * 2048),
        (["devices=2", "precision=bf16", "backend.max_num_seqs=256"], 256 * 1024 * 512),
        (["devices=1", "backend.max_num_seqs=2"], 64 * 2**20),
    ],
)
def test_the_cache_of_a_worker_on_a_cpu(overrides: list[str], expected: int) -> None:
    assert pool_bytes(config(*overrides), FIELDS, on_cpu=True) == expected


def test_the_cache_of_a_worker_on_a_cpu_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    large = FIELDS | {"num_hidden_layers": 200, "max_position_embeddings": 1_000_000}
    assert pool_bytes(config(), {"model_type": "unheard_of"}, on_cpu=True) == 2**30
    free = psutil.virtual_memory().total
    assert 64 * 2**20 < (pool_bytes(config(), large, on_cpu=True) or 0) <= free // 8
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert pool_bytes(config("backend.kv_cache_memory_bytes=12345"), FIELDS, on_cpu=True) == 3 * 2**30
