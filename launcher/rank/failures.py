"""Classify an exception of an engine: refused (the user can fix it), out of memory, or failed."""

from __future__ import annotations

import re
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.results.record import RunError
from launcher.system.files import read_end
from shards.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|[KMGT]iB)"
OUT_OF_MEMORY = re.compile(
    r"(?i:cuda)[^\n]{0,20}out of memory"  # variants of torch, NCCL and Triton
    r"|Failed to CUDA [cm]alloc"  # NCCL
    r"|CUBLAS_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"  # NOT_INITIALIZED: no memory for a handle's workspace
    r"|CUDNN_STATUS_(?:ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)"
    r"|can't allocate memory: you tried to allocate"  # torch's allocator on the CPU
    r"|No available memory for the cache blocks|is less than desired GPU memory utilization"  # vLLM at its start
    r"|Cannot auto-fit max_model_len|To serve at least one request|Failed to load model - not enough GPU memory"
)
ELSEWHERE = "root cause"  # in vLLM's message for an error in another of its processes, which is only in the log


def explain(
    error: BaseException, log: Path | None = None, rank: int | None = None, stage: str = ""
) -> tuple[str, RunError]:
    """The status of a rank that `error` ended in `stage`, and the error for the record.

    If the exception only refers to an error in another process, a shortage of memory is searched at the end of `log`,
    which all processes of the rank share.
    """
    status, text, hint = "failed", str(error), ""
    if isinstance(error, UserError):
        status, text, hint = "refused", error.fact, error.hint
    lines = [*text.strip().splitlines(), type(error).__name__]
    explained = RunError(
        rank=rank,
        stage=stage,
        type=type(error).__name__,
        message=lines[0],
        hint=hint,
        traceback="".join(traceback.format_exception(error)),
    )
    shortage = _shortage(error, log)
    if shortage is not None:
        return "oom", out_of_memory(explained, shortage)
    return status, explained


def out_of_memory(error: RunError, text: str) -> RunError:
    """`error` with the device, the requested and the free bytes from an allocator's message (torch rounds them to two
    digits)."""
    device = None
    if gpu := re.search(r"GPU (\d+) has a total capacity", text):
        device = f"cuda:{gpu.group(1)}"
    elif "DefaultCPUAllocator" in text:
        device = "cpu"
    return replace(
        error,
        device=device,
        asked_bytes=_size(rf"[Tt]ried to allocate {SIZE}", text),
        free_bytes=_size(rf"of which {SIZE} is free", text),
    )


def _size(pattern: str, text: str) -> int | None:
    size = re.search(pattern, text)
    if size:
        return int(float(size.group(1)) * UNITS[size.group(2)])
    return None


def _shortage(error: BaseException, log: Path | None) -> str | None:
    """The out-of-memory message in the chain of exceptions, or in the log; None if there is none."""
    cause: BaseException | None = error
    is_elsewhere = False
    while cause is not None:
        named = type(cause).__name__ == "OutOfMemoryError" or isinstance(cause, MemoryError)
        if named or OUT_OF_MEMORY.search(str(cause)):
            return str(cause)
        is_elsewhere |= ELSEWHERE in str(cause)
        cause = cause.__cause__ or cause.__context__
    if log is None or not is_elsewhere:
        return None
    return next((line for line in reversed(read_end(log).splitlines()) if OUT_OF_MEMORY.search(line)), None)
