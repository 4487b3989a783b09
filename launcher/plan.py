"""`python -m launcher.plan model=falcon_40b machines=2xa6000,1xh200 backend=fsdp,vllm`: a table of plans over choices.

    model=NAME            of conf/model, or a folder with a config.json
    machines=NxDEVICE,..  or devices=1,2,4,8 with device=a6000
    backend=..,..         fsdp deepspeed vllm transformers; all of them if left out
    link=NAME             between the devices; if left out, the usual one of the device
                          With neither machines nor device: this machine, with what launcher.probe measured on it.
    num_nodes=1  precision=bf16  batch_size=1  prompt_tokens=512  max_new_tokens=128
    --markdown            print the table as Markdown

Nothing is loaded, started or downloaded, and torch is not imported.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.markup import escape
from rich.table import Table

from launcher.compose import conf_dir, options
from launcher.config import ConfigError, Precision
from launcher.files import read_json
from launcher.models import EMBEDDED
from launcher.report import console, rate, size
from shards.errors import PlanError, UserError
from shards.hardware import Device, Link, cuda_devices, known_device, known_link
from shards.measured import this_machine
from shards.model import ModelShape
from shards.plan import Plan, PlanRequest, make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

ENGINES = ("fsdp", "deepspeed", "vllm", "transformers")
COUNTS = {"num_nodes": 1, "batch_size": 1, "prompt_tokens": 512, "max_new_tokens": 128}
KEYS = ("model", "machines", "devices", "device", "backend", "link", "precision", *COUNTS)
USUAL_LINKS = {"a100_40g": "nvlink3", "a100_80g": "nvlink3", "h100": "nvlink4", "h200": "nvlink4"}
COLUMNS = (
    "machine",
    "backend",
    "weights",
    "KV cache",
    "other",
    "free",
    "batch",
    "per prompt",
    "full batch",
    "bound by",
)
WIDTH = len(COLUMNS)


@dataclass(frozen=True, slots=True)
class Row:
    """One choice: its plan for the batch asked for and for the largest that fits, or why there is none."""

    machine: str
    engine: str
    link: str
    plan: Plan | None = None
    full: Plan | None = None
    problem: str = ""

    @property
    def pace(self) -> float:
        """Tokens/s for one sequence at the batch asked for; 0 where not known."""
        return 1 / self.plan.limit.seconds if self.plan and self.plan.limit else 0.0


def main(argv: Sequence[str]) -> int:
    """Print the table; 2 and one line for what is wrong with the arguments."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        values = parse([item for item in argv if item != "--markdown"])
        shape = model_shape(values["model"])
        rows = plans(shape, values)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(shape, values, rows), end="") if "--markdown" in argv else show(shape, values, rows)
    return 0


def parse(items: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments by key; ConfigError for a key that is unknown, or no model."""
    values = {}
    for item in items:
        key, equals, value = item.partition("=")
        if key not in KEYS or not equals or not value:
            raise ConfigError(f"{item!r} is not an argument of the plan.", f"one of {', '.join(KEYS)}, as key=value")
        values[key] = value
    if "model" not in values:
        raise ConfigError("No model was named.", f"model=falcon_40b, or one of {', '.join(options('model'))}")
    return values


def model_shape(model: str) -> ModelShape:
    """The shape of a preset, or of the config.json in a folder."""
    if Path(model).is_dir():
        return _read_shape(Path(model))
    if model not in options("model"):
        raise ConfigError(f"There is no model {model!r}.", f"one of {', '.join(options('model'))}, or a folder")
    preset = yaml.safe_load((conf_dir() / "model" / f"{model}.yaml").read_text())
    if preset["config"]:
        return ModelShape.from_config(preset["config"])
    return _read_shape(EMBEDDED / str(preset["path"]).removeprefix("embedded:"))


def _read_shape(folder: Path) -> ModelShape:
    config = read_json(folder / "config.json")
    if config is None:
        raise ConfigError(f"{folder} has no config.json.", "a folder that save_pretrained wrote")
    return ModelShape.from_config(config)


def plans(shape: ModelShape, values: dict[str, str]) -> list[Row]:
    """One row for every machine and engine."""
    names = values.get("backend", ",".join(ENGINES)).split(",")
    if unknown := set(names) - set(ENGINES):
        raise ConfigError(f"backend={','.join(sorted(unknown))} cannot be planned.", f"backend={','.join(ENGINES)}")
    width = dtype_bytes(values.get("precision", "bf16"))
    rows = []
    for machine, device, link, number in machines(values):
        for name in names:
            request = PlanRequest(
                shape=shape,
                engine=name,
                devices=number,
                device=device,
                link=link,
                dtype_bytes=width,
                num_nodes=_asked(values, "num_nodes"),
                batch_size=_asked(values, "batch_size"),
                prompt_tokens=_asked(values, "prompt_tokens"),
                max_new_tokens=_asked(values, "max_new_tokens"),
            )
            rows.append(_row(machine, request))
    return rows


def _row(machine: str, request: PlanRequest) -> Row:
    link = request.link.name if request.link and request.num_devices > 1 else ""
    try:
        plan = make_plan(request)
        full = make_plan(replace(request, batch_size=plan.largest_batch)) if plan.largest_batch else None
    except PlanError as error:
        return Row(machine, request.engine, link, problem=str(error))
    return Row(machine, request.engine, link, plan, full)


def machines(values: dict[str, str]) -> list[tuple[str, Device, Link | None, int]]:
    """Name, device, link and number of devices a node of each machine that was asked for; else of this one."""
    if "machines" in values:
        parts = [item.partition("x") for item in values["machines"].split(",")]
        return [(f"{n}x{name}", known_device(name), _link(values, name), _count("machines", n)) for n, _, name in parts]
    numbers = [_count("devices", n) for n in values.get("devices", "1").split(",")]
    if name := values.get("device"):
        return [(f"{n}x{name}", known_device(name), _link(values, name), n) for n in numbers]
    on_cuda = bool(cuda_devices(os.environ))
    here = [(*this_machine(os.environ, n * _asked(values, "num_nodes"), on_cuda), n) for n in numbers]
    given = known_link(values["link"]) if "link" in values else None
    return [(f"{n}x{device.name}", device, given or link, n) for device, link, n in here]


def _link(values: dict[str, str], device: str) -> Link:
    return known_link(values.get("link", USUAL_LINKS.get(device, "pcie4")))


def dtype_bytes(precision: str) -> int:
    """Bytes of a weight in a precision of the configuration."""
    if precision not in Precision.__members__:
        raise ConfigError(f"precision={precision} is not one.", f"precision={', '.join(Precision.__members__)}")
    return 4 if precision == "fp32" else 2


def _asked(values: dict[str, str], key: str) -> int:
    return _count(key, values.get(key, str(COUNTS[key])))


def _count(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{key}={text} is not a whole number above 0.", f"{key}=2")
    return int(text)


def cells(row: Row) -> list[str]:
    """The cells of a row that has a plan, of its fullest device."""
    assert row.plan is not None
    device = max(row.plan.devices, key=lambda device: device.used_bytes)
    cache = max(device.kv_cache_bytes, device.kv_cache_reserved_bytes)
    other = device.activation_bytes + device.buffer_bytes + device.overhead_bytes
    sizes = [device.parameter_bytes, cache, other, device.free_bytes]
    full = row.full.limit.tokens_per_s if row.full and row.full.limit else None
    bound = row.plan.limit.bound if row.plan.limit else "-"
    batch = "-" if row.plan.largest_batch is None else str(row.plan.largest_batch)
    return [row.machine, row.engine, *map(size, sizes), batch, rate(row.pace or None), rate(full), bound]


def caption(values: dict[str, str], rows: Sequence[Row]) -> str:
    """What the columns are, and which links were taken."""
    tokens = f"{_asked(values, 'prompt_tokens')} + {_asked(values, 'max_new_tokens')} tokens"
    batch, precision = _asked(values, "batch_size"), values.get("precision", "bf16")
    links = dict.fromkeys(f"{row.machine} {row.link}" for row in rows if row.link)
    return (
        f"Of the fullest device, for {tokens} in batches of {batch}, {precision}. Other: activations, gathered layers, "
        "what engine and driver keep. Batch: the largest that fits (of each rank with fsdp). Ceilings in tokens/s: per "
        "prompt in the batch asked for, and of all devices together in the largest; in bold the highest per prompt, to "
        f"1 %.{' Links: ' if links else ''}{', '.join(links)}{'.' if links else ''}"
    )


def fastest(rows: Sequence[Row]) -> set[int]:
    """The places of the rows whose ceiling for one prompt is within 1 % of the highest on that machine."""
    best: dict[str, float] = {}
    for row in rows:
        best[row.machine] = max(row.pace, best.get(row.machine, 0.0))
    return {place for place, row in enumerate(rows) if row.pace and row.pace > 0.99 * best[row.machine]}


def show(shape: ModelShape, values: dict[str, str], rows: Sequence[Row]) -> None:
    """Print the table, the fastest of each machine in bold, and why some choices have no plan."""
    out = console()
    table = Table(
        *COLUMNS, title=f"{values['model']}: {shape.num_parameters:,} parameters", caption=caption(values, rows)
    )
    marked = fastest(rows)
    for place, row in enumerate(rows):
        text = cells(row) if row.plan else [row.machine, row.engine, *["-"] * (WIDTH - 3), "impossible"]
        table.add_row(*map(escape, text), style="bold" if place in marked else "" if row.plan else "dim")
    out.print(table)
    for row in rows:
        if row.problem:
            out.print(f"{row.machine} {row.engine}: {escape(row.problem)}", soft_wrap=True)


def markdown(shape: ModelShape, values: dict[str, str], rows: Sequence[Row]) -> str:
    """The same as Markdown text."""
    marked = fastest(rows)
    lines = [f"**{values['model']}**: {shape.num_parameters:,} parameters.", "", _pipes(COLUMNS)]
    lines.append(_pipes(["---", "---", *["---:"] * (WIDTH - 3), "---"]))
    for place, row in enumerate(rows):
        text = cells(row) if row.plan else [row.machine, row.engine, *["-"] * (WIDTH - 3), "impossible"]
        bold = (COLUMNS.index("backend"), COLUMNS.index("per prompt")) if place in marked else ()
        lines.append(_pipes([f"**{cell}**" if at in bold else cell for at, cell in enumerate(text)]))
    lines += ["", caption(values, rows), ""]
    problems = [f"- {row.machine} {row.engine}: {row.problem}" for row in rows if row.problem]
    return "\n".join([*lines, *problems, *([""] if problems else [])])


def _pipes(texts: Sequence[Any]) -> str:
    return f"| {' | '.join(texts)} |"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
