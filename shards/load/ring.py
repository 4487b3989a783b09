"""Host memory through which bytes of a file reach tensors that cannot take them straight from it."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Buffer:
    """Reusable host memory; with CUDA it is pinned, and not free before the copy out of it is done."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._copied: torch.cuda.Event | None = None

    def copy(self, stored: torch.Tensor, cut: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor) -> None:
        """Give `out` what `cut` takes of elements that lie in this buffer.

        A card is sent all of them and cuts there: what is cut here is no longer one piece of pinned memory, and its
        copy would go through a piece of pageable memory and hold up the thread that reads.
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
    """A copy on a card; from pinned memory without waiting for it."""
    return stored.to(device, non_blocking=True)


class Ring:
    """At most `size` buffers of `nbytes` each, made when first needed. Safe to use from threads."""

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
