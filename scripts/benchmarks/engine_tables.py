"""The output files of benchmark_engines.py: all figures as JSON, and tables in Markdown."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

from launcher.system.environment import describe
from launcher.system.files import write_json, write_text
from launcher.system.typed import to_plain
from shards.machine.rates import this_machine

TITLE = """# All engines compared with equivalent code without this project

tokens/s: new tokens of all prompts divided by the time of the call, median of the rounds with minimum and maximum.
Contestants take turns, and the others are stopped meanwhile; ratios are medians of the ratios of each round. The
ceiling is what the measured rates of the machine allow for the planned steps. Same: prompts with the same answer as
model.generate; in bf16 another order of additions may change it. Load: until the first prompt can be answered.
vllm.LLM runs with its own defaults, and so with as many threads in each worker as there are cores; backend=vllm
divides the cores among its workers, and scripts/benchmarks/vllm_overhead.py compares the two with equal threads.
"""
HEADER = "| contestant | tokens/s (min … max) | rounds | of model.generate | of reference | of ceiling | same | load |"
RULE = "|---|---|---|---|---|---|---|---|"


def markdown(points: list[dict[str, Any]]) -> str:
    """A table for each model and precision."""
    lines = []
    for point in points:
        lines += ["", f"{point['model']}, {point['precision']}, {point['prompts']} prompts", "", HEADER, RULE]
        for row in point["rows"]:
            if "failure" in row:
                lines.append(f"| {row['name']} | {row['failure']} | | | | | | |")
                continue
            same = ""
            if row["same_answers"] is not None:
                same = f"{row['same_answers']}/{row['answers']}"
            speed = f"{row['tokens_per_s']:,.1f} ({min(row['rounds']):,.1f} … {max(row['rounds']):,.1f})"
            shares = (
                cell(row["of_base"], ".2f"), cell(row["of_reference"], ".2f", f" of {row['reference']}"),
                cell(row["share_of_ceiling"], ".1%"),
            )  # fmt: skip
            cells = (row["name"], speed, str(len(row["rounds"])), *shares, same, f"{row['load_s']:.1f} s")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip() + "\n"


def cell(value: float | None, form: str, unit: str = "") -> str:
    """A figure with its unit; empty for None and 0."""
    if not value:
        return ""
    return f"{value:{form}}{unit}"


def write(output: Path, results: list[dict[str, Any]]) -> None:
    """Write NAME.json and NAME.md."""
    device, link = this_machine(os.environ, 2, False)
    environment = to_plain(describe())
    del environment["host"], environment["executable"]
    head = {
        "command": f"python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}", "date": f"{date.today()}",
        "environment": environment, "device": to_plain(device), "link": to_plain(link),
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_suffix(".json"), {**head, "points": results})
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    text = (
        f"{environment['cpu']}, {environment['cpu_count']} cores; {packages}; {head['date']}\n\n    {head['command']}\n"
    )
    write_text(output.with_suffix(".md"), f"{TITLE}\n{text}\n{markdown(results)}")
