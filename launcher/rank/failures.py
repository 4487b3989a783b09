"""What an exception of an engine means: a thing to mend, memory that ran out (how much, where), or a failure."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Any

from launcher.system.files import read_end
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|[KMGT]iB)"
OUT_OF_MEMORY = re.compile(
    r"(?i:cuda)[^\n]{0,20}out of memory"  # torch, NCCL and Triton, each in its own way
    r"|Failed to CUDA [cm]alloc"  # NCCL
    r"|CUBLAS_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"  # the second where a handle finds no room for its workspace
    r"|CUDNN_STATUS_(?:ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)"
    r"|can't allocate memory: you tried to allocate"  # torch's allocator on the CPU
    r"|No available memory for the cache blocks|is less than desired GPU memory utilization"  # vLLM before it starts
    r"|Cannot auto-fit max_model_len|To serve at least one request|Failed to load model - not enough GPU memory"
)
ELSEWHERE = "root cause"  # vLLM of an error in another of its processes, which has had its words in the log


def explain(error: BaseException, log: Path | None = None) -> tuple[str, dict[str, Any]]:
    """The status of a rank that `error` ended, and the error as a record keeps it.

    Where the error only points at its cause, that is looked for at the end of `log`, which the rank's processes share.
    Of memory that ran out `device`, `asked_bytes` and `free_bytes` are as the engine's message says them (torch rounds
    to two digits), None where it does not.
    """
    text = str(error.fact if isinstance(error, UserError) else error).strip()
    said = {
        "type": type(error).__name__,
        "message": text.splitlines()[0] if text else type(error).__name__,
        "hint": error.hint if isinstance(error, UserError) else "",
        "traceback": "".join(traceback.format_exception(error)),
    }
    shortage = _shortage(list(_causes(error)), log)
    if shortage is not None:
        return "oom", said | out_of_memory(shortage)
    return ("refused" if isinstance(error, UserError) else "failed"), said


def out_of_memory(text: str) -> dict[str, Any]:
    """Device, bytes asked and bytes free by the message of an allocator."""
    gpu = re.search(r"GPU (\d+) has a total capacity", text)
    on_cpu = "DefaultCPUAllocator" in text
    return {
        "device": f"cuda:{gpu.group(1)}" if gpu else "cpu" if on_cpu else None,
        "asked_bytes": _size(rf"[Tt]ried to allocate {SIZE}", text),
        "free_bytes": _size(rf"of which {SIZE} is free", text),
    }


def _size(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(float(found.group(1)) * UNITS[found.group(2)]) if found else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _shortage(causes: Sequence[BaseException], log: Path | None) -> str | None:
    """The words that say that memory ran out, if any do."""
    for cause in causes:
        named = type(cause).__name__ == "OutOfMemoryError" or isinstance(cause, MemoryError)
        if named or OUT_OF_MEMORY.search(str(cause)):
            return str(cause)
    if log is None or not any(ELSEWHERE in str(cause) for cause in causes):
        return None
    return next((line for line in reversed(read_end(log).splitlines()) if OUT_OF_MEMORY.search(line)), None)
