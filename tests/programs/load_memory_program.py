"""Loads a matrix [4096, 2048] of the values 0, 1, ... from each folder, each in a fork of its own whose heap is new.

`load_memory_program.py FOLDER:DTYPE ...` prints the rises of anonymous memory in bytes as one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from launcher.backends.memory import host_anonymous_bytes
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.load import load_weights


def rise(folder: Path, dtype: torch.dtype) -> int:
    """The bytes of anonymous memory that loading the matrix in a type takes."""
    model = nn.Linear(2048, 4096, bias=False, dtype=dtype, device="meta")
    checkpoint, before = Checkpoint.open(folder), host_anonymous_bytes()
    load_weights(model, checkpoint, "cpu")
    taken = host_anonymous_bytes() - before
    assert torch.equal(model.weight, torch.arange(4096.0 * 2048).view(4096, 2048).to(dtype))
    return taken


def main() -> None:
    rises = []
    for word in sys.argv[1:]:
        folder, _, dtype = word.rpartition(":")
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writer, str(rise(Path(folder), getattr(torch, dtype))).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            rises.append(int(answer.read()))
        os.waitpid(pid, 0)
    print(json.dumps(rises))


if __name__ == "__main__":
    main()
