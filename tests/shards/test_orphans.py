"""Child processes end when the process that started them ends, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from running import environment, wait_until_ended

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_who_is_asked_for_shapes_ends_with_who_asks(number: int, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $$ > $PIDS.part; mv $PIDS.part $PIDS; exec sleep 600\n")
    python.chmod(0o755)
    program = f"from shards.model.any_shape import ask_transformers; ask_transformers({{}}, {str(python)!r})"
    pids = tmp_path / "pids"
    asking = subprocess.Popen([sys.executable, "-c", program], env=environment(PIDS=str(pids)), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not pids.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asking.send_signal(number)
    asking.communicate(timeout=60)
    wait_until_ended([int(pids.read_text())], 10)
