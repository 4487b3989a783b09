"""Ten thousand decode steps: what a rank holds does not grow with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from running import ROOT, run, torchrun

MIB = 1024**2
PROGRAM = str(ROOT / "tests" / "programs" / "growth_program.py")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_host_memory_does_not_grow_with_decode_steps(ranks: int, tmp_path: Path) -> None:
    command = [PROGRAM, str(tmp_path), str(ranks)]
    ended = run([sys.executable, *command], 280) if ranks == 1 else torchrun(ranks, *command, timeout=280)
    assert ended.code == 0, ended.err[-3000:]
    for rank in range(ranks):
        held = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert len(held) == 10
        assert held[-1] - held[0] <= 5 * MIB, [value // MIB for value in held]
