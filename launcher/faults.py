"""What an exception of an engine means: a thing to mend, memory that ran out (how much, where), or a failure."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|[KMGT]iB)"
OUT_OF_MEMORY = (  # CUDA and its libraries, torch's allocator on the CPU, vLLM's two ways to say it before it starts
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory: you tried to allocate",
    "No available memory for the cache blocks",
    "is less than desired GPU memory utilization",
)


def explain(error: BaseException) -> tuple[str, dict[str, Any]]:
    """The status of a rank that `error` ended, and the error as a record keeps it.

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
    shortage = next((cause for cause in _causes(error) if _is_out_of_memory(cause)), None)
    if shortage is not None:
        return "oom", said | out_of_memory(str(shortage))
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


def _is_out_of_memory(error: BaseException) -> bool:
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or any(text in str(error) for text in OUT_OF_MEMORY)
