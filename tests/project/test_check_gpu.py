"""The command for the first machine with a card: its list of runs on a CPU, and one line where there is no card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import ROOT, run

SCRIPT = ["bash", str(ROOT / "scripts" / "check_gpu.sh")]


def test_without_a_card_it_ends_in_one_line(tmp_path: Path) -> None:
    ended = run([*SCRIPT, str(tmp_path / "out")], timeout=60)
    line = "No CUDA device can be seen. HINT: scripts/check_gpu.sh --rehearse\n"
    assert (ended.code, ended.out, ended.err) == (2, "", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_its_list_of_runs_goes_through_and_is_not_made_twice(tmp_path: Path) -> None:
    ended = run([*SCRIPT, "--rehearse", str(tmp_path)], timeout=280)
    assert ended.code == 0, (ended.out, ended.err, [json.loads(path.read_text()) for path in tmp_path.glob("*.json")])
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0] for line in rows] == [
        "| tiny_llama_transformers_x1_b1",
        "| tiny_llama_transformers_x1_b2",
    ]
    for line in rows:
        figures = line.strip("| ").split(" | ")[1:]
        assert all(float(figures[place]) > 0 for place in (0, 1, 2))
        assert figures[5] == figures[6]  # bytes of parameters: planned and measured
    again = run([*SCRIPT, "--rehearse", str(tmp_path)], timeout=60)
    assert (again.code, again.out) == (0, f"{tmp_path / 'table.md'}\n")
