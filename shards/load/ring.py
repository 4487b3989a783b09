"""Host buffers for bytes on their way from a file to tensors that cannot be read into directly."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Buffer:
    """A reusable host buffer; with CUDA it is pinned, and in use until its copy to the device is done."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._copied: torch.cuda.Event | None = None

    def copy(self, stored: torch.Tensor, cut: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor) -> None:
        """Copy the part `cut` of the elements in this buffer to `out`.

        A GPU is sent all elements and cuts there: a cut in host memory is not contiguous, so its copy would go through
        pageable memory and block the reading thread.
        """
        if out.device.type == "cpu":
            out.copy_(cut(stored))
            return
        out.copy_(cut(send(stored, out.device)))
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(out.device))

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def send(stored: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a GPU; asynchronous from pinned memory."""
    return stored.to(device, non_blocking=True)


class Ring:
    """A thread-safe pool of at most `size` buffers of `nbytes` each, allocated on demand."""

    def __init__(self, size: int, nbytes: int, pinned: bool) -> None:
        self._left = size
        self._nbytes = nbytes
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()

    def take(self) -> Buffer:
        with self._lock:
            if self._free.empty() and self._left:
                self._left -= 1
                return Buffer(self._nbytes, self._pinned)
        buffer = self._free.get()
        buffer.wait()
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        self._free.put(buffer)
