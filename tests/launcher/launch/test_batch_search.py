"""Running out of memory is a result: which rank, at which point, how much; and the search for the largest batch."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from driver import A6000, nvml
from running import launcher

from launcher.backends import memory as measure
from launcher.backends.base import Prompt
from launcher.config.schema import ConfigError
from launcher.launch.batch_search import enlarged, largest
from launcher.rank.failures import explain
from launcher.system.gpu_users import neighbours, sentence
from shards.errors import PlanError
from shards.machine.nvml import CardProcess

GIB = 2**30
SYNTHETIC = ("backend=dummy", "prompts=synthetic", "prompts.count=40", "prompts.output_tokens=4", "devices=1")

TORCH = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 139.81 GiB of which 5.12 GiB is "
    "free. Process 1 has 134.68 GiB memory in use. Of the allocated memory 134.00 GiB is allocated by PyTorch."
)
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n{}"
)
TORCH_MATH = "CUDA error: {} when calling `{}`"
VLLM_TOO_SMALL = ("Cannot auto-fit max_model_len", "To serve at least one request with the model's max seq len")
UNKNOWN = (None, None, None)
VLLM = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def caused(by: Exception) -> Exception:
    error = RuntimeError("the worker failed")
    error.__cause__ = by
    return error


def on_the_cpu() -> RuntimeError:
    try:
        torch.empty(2**48, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("256 TiB were to be had")


@pytest.mark.parametrize(
    ("error", "status", "device", "asked", "free"),
    [
        (torch.OutOfMemoryError(TORCH), "oom", "cuda:1", 20 * GIB, int(5.12 * GIB)),
        (caused(torch.OutOfMemoryError(TORCH)), "oom", "cuda:1", 20 * GIB, int(5.12 * GIB)),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), "oom", None, None, None),
        (RuntimeError(NCCL.format("Cuda failure 2 'out of memory'")), "oom", None, None, None),
        (RuntimeError(NCCL.format("Failed to CUDA calloc async 608 bytes")), "oom", None, None, None),
        (RuntimeError(NCCL.format("Cuda failure 999 'unknown error'")), "failed", None, None, None),
        (RuntimeError(TORCH_MATH.format("CUBLAS_STATUS_NOT_INITIALIZED", "cublasCreate(handle)")), "oom", *UNKNOWN),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "oom", *UNKNOWN),
        (RuntimeError(TORCH_MATH.format("CUBLAS_STATUS_INVALID_VALUE", "cublasGemmEx(...)")), "failed", *UNKNOWN),
        *((ConfigError(f"vLLM refuses: {text} (1024), ..."), "oom", *UNKNOWN) for text in VLLM_TOO_SMALL),
        (on_the_cpu(), "oom", "cpu", 2**48, None),
        (MemoryError(), "oom", None, None, None),
    ],
    ids=[
        "torch on CUDA",
        "behind another error",
        "CUDA itself",
        "NCCL",
        "NCCL's allocation",
        "NCCL otherwise",
        "cuBLAS without room for a handle",
        "cuDNN",
        "cuBLAS otherwise",
        "vLLM without a token",
        "vLLM without a sequence",
        "torch on a CPU",
        "Python",
    ],
)
def test_memory_that_ran_out(
    error: Exception, status: str, device: str | None, asked: int | None, free: int | None
) -> None:
    found, said = explain(error)
    values = (said.device, said.asked_bytes, said.free_bytes)
    assert (found, *values) == (status, device, asked, free)


def test_vllm_still_says_it_in_these_words() -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(vllm.origin).parent / "v1" / "core" / "kv_cache_utils.py").read_text()
    assert [text for text in (*VLLM_TOO_SMALL, "No available memory for the cache blocks") if text not in source] == []


@pytest.mark.parametrize(
    ("error", "log", "status"),
    [
        (VLLM, f"(Worker_TP1 pid=7) ERROR torch.OutOfMemoryError: {TORCH}\n(Worker_TP1 pid=7) its end\n", "oom"),
        (VLLM, "(EngineCore pid=7) ValueError: No available memory for the cache blocks.\n", "oom"),
        (VLLM, "(Worker_TP1 pid=7) ERROR torch.cuda is broken\n", "failed"),
        (VLLM, None, "failed"),
        ("the ranks chose different tokens", f"WARNING {TORCH}\n", "failed"),
    ],
    ids=["a worker", "the engine core", "another cause", "no log", "an error of its own"],
)
def test_a_root_cause_is_looked_for_in_the_log(error: str, log: str | None, status: str, tmp_path: Path) -> None:
    path = tmp_path / "rank_0.log"
    if log is not None:
        path.write_text("of another time\n" * 100_000 + log)
    found, said = explain(RuntimeError(error), path)
    assert (found, said.message) == (status, error)
    if log is not None and TORCH in log and status == "oom":
        assert (said.device, said.asked_bytes, said.free_bytes) == ("cuda:1", 20 * GIB, int(5.12 * GIB))


def test_other_errors_are_what_they_were() -> None:
    assert explain(ValueError("a memory of old times"))[0] == "failed"
    status, said = explain(PlanError("It does not fit.", "more devices"))
    assert (status, said.type, said.message, said.hint) == (
        "refused",
        "PlanError",
        "It does not fit.",
        "more devices",
    )


@pytest.mark.parametrize("most", [1, 2, 5, 64, 1000, 2**20])
@pytest.mark.parametrize("start", [1, 2, 16, 37, 1000])
def test_the_search_finds_the_largest_and_asks_once(start: int, most: int) -> None:
    for true in (0, 1, 2, 3, 15, 16, 17, 36, 37, 38, 64, 999, 1000, 5000, 2**20):
        asked: list[int] = []

        def fits(batch: int, asked: list[int] = asked, true: int = true) -> bool:
            assert 1 <= batch <= most
            asked.append(batch)
            return batch <= true

        assert largest(fits, min(start, most), most) == min(true, most)
        assert len(set(asked)) == len(asked) <= 40


def test_a_search_near_a_good_plan_is_short() -> None:
    asked: list[int] = []
    assert largest(lambda batch: not asked.append(batch) and batch <= 103, 100, 2**20) == 103  # type: ignore[func-returns-value]
    assert asked == [100, 106, 103, 104]


def test_each_rank_is_given_the_longest_prompts_first() -> None:
    prompts = (Prompt(0, "a", (1,)), Prompt(1, "b", (1, 2, 3)), Prompt(2, "c", (1, 2)))
    made = enlarged(prompts, 4, ranks=2)
    assert [prompt.index for prompt in made] == list(range(8))
    assert [prompt.text for prompt in made[0::2]] == ["b", "c", "a", "b"]
    assert [prompt.text for prompt in made[1::2]] == ["b", "c", "a", "b"]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))]


@pytest.mark.slow
def test_the_largest_batch_is_found_and_run(tmp_path: Path) -> None:
    search = (*SYNTHETIC, "backend.memory_batch=6", "measure.find_batch_size=true", f"output_dir={tmp_path}")
    ended = launcher(*search)
    assert ended.code == 0, ended.err
    assert "largest batch: 6 by 4 tries; the plan had no limit" in ended.out
    [record] = records(tmp_path)
    assert (record["status"], record["config"]["measure"]["batch_size"], record["totals"]["prompts"]) == ("ok", 6, 40)
    found = record["batch_search"]
    tries = [(one["batch"], one["status"]) for one in found["tries"]]
    assert tries == [(4, "ok"), (5, "ok"), (7, "oom"), (6, "ok")]
    assert (found["largest_batch"], found["limited_by"], found["planned"]) == (6, "memory", None)
    again = launcher(*search, "resume=true")
    assert again.last_json == ended.last_json
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_out_of_memory_is_a_row_like_any_other(tmp_path: Path) -> None:
    ended = launcher("-m", *SYNTHETIC, "backend.memory_batch=6", "measure.batch_size=6,8", f"output_dir={tmp_path}")
    assert ended.code == 1
    assert [row["status"] for row in ended.last_json["records"]] == ["ok", "oom"]
    error = ended.last_json["records"][1]["error"]
    assert (error["rank"], error["stage"], error["device"]) == (0, "warmup 1/1", "cuda:0")
    assert (error["asked_bytes"], error["free_bytes"]) == (8 * 2**20, 6 * 2**20)
    assert [record["status"] for record in records(tmp_path)] == ["ok", "oom"]


@pytest.mark.slow
def test_no_batch_fits(tmp_path: Path) -> None:
    ended = launcher(*SYNTHETIC, "backend.memory_batch=0", "measure.find_batch_size=true", f"output_dir={tmp_path}")
    assert (ended.code, ended.last_json["status"], ended.last_json["error"]["asked_bytes"]) == (1, "oom", 2**20)


def test_a_neighbour_on_a_device_is_named() -> None:
    mine = CardProcess(os.getpid(), 3 * GIB)
    gone = CardProcess(2**22 + 1, None)
    who = f"process {os.getpid()} ({psutil.Process().name()})"
    assert sentence("GPU-1", mine) == f"GPU-1: {who} already held 3.00 GiB when the run began"
    expected = f"GPU-1: process {2**22 + 1} (not visible from here) already held memory when the run began"
    assert sentence("GPU-1", gone) == expected
    assert neighbours({"CUDA_VISIBLE_DEVICES": ""}, 8) == []


@pytest.mark.parametrize(
    ("processes", "used", "reason"),
    [
        ([(1, 5), (os.getpid(), 3 * GIB)], 3 * GIB, None),
        ([(1, 5)], None, "NVML does not show this process (another PID namespace?)"),
        ([(os.getpid(), None)], None, "NVML lists this process, but the driver does not report its memory"),
        (None, None, "NVML: Not Supported"),
    ],
)
def test_what_nvml_says_of_this_process(
    processes: list[tuple[int, int | None]] | None,
    used: int | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in processes or ()]
    card = A6000 if processes is None else A6000 | {"processes": found}
    monkeypatch.setattr("shards.machine.nvml.pynvml", nvml([card]))
    reasons: dict[str, str] = {}
    assert measure.nvml_used("GPU-a", reasons) == used
    assert reasons == ({"nvml_used_bytes": reason} if reason else {})
