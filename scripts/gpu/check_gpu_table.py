"""The table of scripts/check_gpu.sh: the outcome of each step, and the figures of each run next to plain generate."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from launcher.system.environment import describe

GIB = 2**30
HEAD = (
    "run", "steps", "tokens/s (min … max)", "plain generate (min … max)", "ratio", "MBU", "of the ceiling", "ttft, ms",
    "itl, ms", "weights, GiB", "KV cache, GiB", "peak, GiB", "peak of plain, GiB", "same tokens",
)  # fmt: skip
NOTES = """\
In brackets: as planned. Steps: how they were made, the seconds that it took, and a note where they differ from those
that are not made ahead. tokens/s: new tokens of all prompts by the time from the start of a call to the last of them,
prompts included, median of the repeats; ratio: the median of those of each repeat and the turn of plain `generate`
before it. Peak: of CUDA's allocator. Same tokens: prompts for which both chose the same; in 16 bits the order of
additions differs, and so may tokens.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """A run of an engine: `batch` is the number of prompts answered at once, `compile` the value of measure.compile
    (None: auto), `quantization` that of quantization."""

    engine: str
    model: str
    batch: int
    devices: int = 1
    compile: str | None = None
    quantization: str | None = None

    @property
    def name(self) -> str:
        name = f"{self.model}_{self.engine}_x{self.devices}_b{self.batch}"
        return "_".join([name, *filter(None, (self.compile, self.quantization))])


def write_table(out: Path, rows: list[tuple[str, Point | None, dict[str, Any]]]) -> None:
    """OUT/table.md: `rows` are the steps with their points and results."""
    told = describe()
    cards = told.gpus
    hardware, state = told.cpu or "a processor", "no commit"
    if cards:
        hardware = f"{', '.join(map(str, cards.names))}, driver {cards.driver}"
    if told.git:
        state = f"commit {told.git.commit[:12]}"
        if told.git.dirty:
            state += " with changes"
    packages = ", ".join(f"{name} {version}" for name, version in told.packages.items())
    lines = [
        f"# {hardware}", "",
        f"{date.today().isoformat()}, {state}, Python {told.python}, {packages}", "",
        "| step | state | tries | seconds | its last words |", "| --- | --- | ---: | ---: | --- |",
    ]  # fmt: skip
    for name, point, result in rows:
        lines.append("| " + " | ".join(step_cells(name, point, result)) + " |")
    lines += ["", "| " + " | ".join(HEAD) + " |", "| --- |" + " ---: |" * (len(HEAD) - 1)]
    for name, point, result in rows:
        if point is not None and result["state"] == "ok":
            lines.append("| " + " | ".join([name, *figures(run_dir_of(result))]) + " |")
    temporary = out / "table.part"
    temporary.write_text("\n".join([*lines, "", NOTES]))
    temporary.replace(out / "table.md")


def step_cells(name: str, point: Point | None, result: dict[str, Any]) -> list[str]:
    """The cells of a step: state and last message, which for a run is its error, for the doctor the failed checks."""
    last = result["last"]
    told = {}
    if last.startswith("{"):
        told = json.loads(last)
    if point is not None and told:
        last = (told.get("error") or {}).get("message", "")
    elif "checks" in told:
        poor = [check for check in told["checks"] if check["state"] not in ("ok", "note")]
        last = "; ".join(f"{check['name']} {check['state']}" for check in poor)
    words = " ".join(last.replace("|", "/").split())
    return [name, result["state"], str(result["tries"]), f"{result['seconds']:.0f}", words[:200]]


def run_dir_of(result: dict[str, Any]) -> Path:
    """The run directory, from the last line of the run's output."""
    return Path(json.loads(result["last"])["run_dir"])


def figures(run_dir: Path) -> list[str]:
    """The cells of a run; a dash for unknown values."""
    record = json.loads((run_dir / "record.json").read_text())
    plain = json.loads((run_dir / "plain.json").read_text())
    ours = record["metrics"]["new_tokens_per_s"]["values"]
    theirs = [plain["new_tokens"] / seconds for seconds in plain["seconds"]]
    ratios = [one / other for one, other in zip(ours, theirs, strict=False)]
    of_plain = [plain["failure"] or "-", "-", "-"]  # speed, ratio, same tokens
    if ratios:
        same = f"{plain['prompts_with_the_same_tokens']}/{plain['prompts']}"
        of_plain = [spread(theirs), f"{statistics.median(ratios):.3f}", same]
    device, planned = record["devices"][0], record["plan"]["devices"][0]
    peak = device["peak_allocated_bytes"]
    if peak is not None and not (record["backend"] == "vllm" and record["num_devices"] == 1):  # vLLM: separate process
        peak -= plain["weights_of_its_own_bytes"]
    most = sum(planned[name] for name in ("parameter_bytes", "activation_bytes", "buffer_bytes"))
    most += max(planned["kv_cache_bytes"], planned["kv_cache_reserved_bytes"])
    return [
        steps_cell(record["compilation"]),
        spread(ours),
        *of_plain[:2],
        percent(record["mbu"]["share"]),
        percent(record["ceiling"]["share"]),
        milliseconds(record["ttft_s"]),
        milliseconds(record["itl_s"]),
        gib(device["parameter_bytes"], planned["parameter_bytes"]),
        gib(device["kv_cache_bytes"], planned["kv_cache_bytes"]),
        gib(peak, most),
        gib(plain["peak_allocated_bytes"]),
        of_plain[2],
    ]


def steps_cell(compilation: dict[str, Any] | None) -> str:
    """How the engine compiled its steps; a dash if it does not say."""
    if compilation is None:
        return "-"
    seconds = f"{compilation['seconds']:.0f} s" if compilation["seconds"] else None
    note = compilation["note"] and " ".join(compilation["note"].replace("|", "/").split())
    return ", ".join(filter(None, (compilation["way"], seconds, note)))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} … {max(values):,.1f})"


def percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.1%}"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:,.2f}"


def gib(measured: int | None, planned: int | None = None) -> str:
    """Bytes as GiB, with enough digits for tiny models; the planned value in parentheses."""
    text = "-"
    if measured is not None:
        text = f"{measured / GIB:.4g}"
    if planned is not None:
        text += f" ({planned / GIB:.4g})"
    return text
