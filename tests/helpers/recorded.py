"""Simulated CUDA graphs for machines without a GPU: operators are recorded on capture, and run again on replay."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


class Recorded(TorchDispatchMode):
    """A graph: the operators in order, with their input and output tensors.

    As on a GPU, a replay reads and writes the memory of the capture, even if the host has used it for other tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


class Stream:
    """A stream that never needs to wait."""

    def wait_stream(self, other: Stream) -> None:
        """Does nothing: on a CPU every operator has finished when it returns."""


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Make torch.cuda capture on the CPU; returns the list to which each captured graph is added."""
    graphs: list[Recorded] = []
    modes = ["default"]

    @contextlib.contextmanager
    def graph(recorded: Recorded, **options: Any) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        assert modes[-1] == "default", "a capture that forbids waiting says no more than CUDA does"
        graphs.append(recorded)
        with recorded:
            yield

    for name, value in {
        "graph": graph, "CUDAGraph": Recorded, "Stream": Stream, "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(), "graph_pool_handle": lambda: (0, 1),
        "get_sync_debug_mode": lambda: modes[-1], "set_sync_debug_mode": modes.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return graphs
