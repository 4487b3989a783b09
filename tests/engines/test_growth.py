"""The memory of a rank does not grow over thousands of decode steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import ranks_of

from launcher.models import EMBEDDED

MIB = 1024**2
STEPS = {1: 1000, 2: 150}  # steps of each of ten calls, by number of ranks: two ranks are slower


def kv_bytes_per_token() -> int:
    fields = json.loads((EMBEDDED / "tiny_draft" / "config.json").read_text())
    return int(2 * 4 * fields["num_hidden_layers"] * fields["num_key_value_heads"] * fields["head_dim"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_host_memory_does_not_grow_with_decode_steps(ranks: int, tmp_path: Path) -> None:
    ended = ranks_of("growth_program.py", ranks, str(tmp_path), str(ranks), str(STEPS[ranks]), timeout=280)
    assert ended.code == 0, ended.err[-3000:]
    for rank in range(ranks):
        held = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert len(held["host"]) == 10
        assert held["host"][-1] - held["host"][0] <= 5 * MIB, [value // MIB for value in held["host"]]
        assert held["cache"] == [(3 + STEPS[ranks]) * kv_bytes_per_token()] * 10
