"""`python -m launcher.plan model=falcon_40b machines=2xa6000,1xh200 backend=fsdp,vllm`: a table of plans over choices.

    model=NAME            of conf/model, a folder with a config.json, or a hub id, of which the config is fetched
    machines=NxDEVICE,..  or devices=1,2,4,8 with device=a6000
    device.memory=48GiB   device.bandwidth=768GB/s  device.flops=154.8TFLOP/s: of a device that is not known (gpu), or
                          in place of what is
    backend=..,..         engines by name; if left out all that have weights
    link=NAME             between the devices; if left out, the usual one of the device, and none between nodes
                          With neither machines nor device: this machine, with what launcher.probe measured on it.
    quantization=..,..    none fp8 fp8_channel fp8_block int8 int8_wo int8_dyn int4_wo nf4 nf4_dq fp4 int4_g128, a row
                          each; if left out, what the model's own config.json says
    num_nodes=1  precision=bf16  batch_size=1  prompt_tokens=512  max_new_tokens=128

Nothing is loaded or downloaded, and torch is not imported. For a family that is not known here, transformers is asked
in another process, which takes seconds.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import difflib
import os
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from launcher.composition.presets import conf_dir, options
from launcher.config.engines import NO_PLAN, engines, load_engine, names
from launcher.config.keys import nearest, wrong_value
from launcher.config.machine import UNITS, described, machine_of
from launcher.config.parts.storage import Precision
from launcher.config.schema import ConfigError
from launcher.models import embedded_folder
from launcher.prepare.planning import default_planners
from launcher.prepare.shapes import built_of, config_of
from launcher.report.plan_table import Row, as_json, markdown, show, show_modules
from launcher.system.terminal import Parser, run_command
from shards.checkpoint.hub import resolve
from shards.errors import PlanError, UserError
from shards.machine.cards import cuda_devices
from shards.machine.hardware import Device, Link, known_device, known_link, usual_link
from shards.machine.rates import this_machine
from shards.model.quantization import known_quantization
from shards.model.quantized_checkpoint import from_config
from shards.plan.plan import make_plan
from shards.plan.request import MOST_DEVICES, PlanRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.model.quantization import Quantization
    from shards.model.shape import ModelShape
    from shards.untrusted_files import JsonObject

COUNTS = {"num_nodes": 1, "batch_size": 1, "prompt_tokens": 512, "max_new_tokens": 128}
KEYS = ("model", "machines", "devices", "device", *UNITS, "backend", "link", "precision", "quantization", *COUNTS)
SOURCES = {
    "fp8": "an fp8 checkpoint, or a run with quantization=fp8",
    "fp8_channel": "an fp8 checkpoint, or a run with quantization=fp8_channel",
    "fp8_block": "an fp8 checkpoint, or a run with quantization=fp8_block",
    "int4_g128": "a GPTQ or AWQ checkpoint of 4 bits in groups of 128",
}
"""Sources of weights in a quantization format."""


def main(argv: Sequence[str]) -> int:
    """Print the table; returns 0, or 2 with one line on stderr for a mistake in the arguments."""
    parser = Parser(prog="python -m launcher.plan", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as above, in any order")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the whole plans")
    parser.add_argument("--modules", action="store_true", help="print what the model is made of: parameters by module")
    try:
        arguments, unknown = parser.parse_known_intermixed_args(argv)
        values = parse([*unknown, *arguments.words])
        config = model_config(values["model"])
        built = built_of(config)
        shape = built.shape
        for note in built.all_notes():
            print(note, file=sys.stderr)
        if arguments.modules:
            show_modules(values["model"], shape, _precision(values).num_bytes)
            return 0
        rows = plans(shape, values, quantizations(values, config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model, text = f"{shape.num_parameters:,} parameters", caption(values, rows)
    if arguments.json:
        print(as_json(values["model"], shape.num_parameters, rows))
    elif arguments.markdown:
        print(markdown(values["model"], model, text, rows), end="")
    else:
        show(values["model"], model, text, rows)
    return 0


def parse(items: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments by key; ConfigError for an unknown key, or without a model."""
    values = {}
    for item in items:
        key, equals, value = item.partition("=")
        if key not in KEYS or not equals or not value:
            near = nearest(key.lstrip("-"), KEYS)
            if near:
                hint = f"{near}={value or 'VALUE'}"
            else:
                hint = "python -m launcher.plan --help"
            raise ConfigError(f"{item} is not an argument of the plan.", hint)
        values[key] = value
    if "model" not in values:
        raise ConfigError(f"No model was named: one of {', '.join(options('model'))}.", "model=falcon_40b")
    return values


def model_config(model: str) -> JsonObject:
    """The transformers config of a preset, of the config.json in a folder, or of a hub id, whose config is fetched."""
    if Path(model).is_dir():
        return config_of(Path(model))
    if model not in options("model"):
        if "/" in model:
            return config_of(resolve(model, weights=False))
        near = difflib.get_close_matches(model, options("model"), 1, cutoff=0)
        fact = f"model={model} is neither a folder, nor a hub id, nor one of {', '.join(options('model'))}."
        raise ConfigError(fact, f"model={near[0]}")
    preset = yaml.safe_load((conf_dir() / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    config: JsonObject | None = preset["config"]
    if config:
        return config
    return config_of(embedded_folder(preset["path"], "model.path") or Path(preset["path"]))


def quantizations(values: dict[str, str], config: JsonObject) -> list[Quantization | None]:
    """The requested quantizations, or that of the model's own config."""
    if names := values.get("quantization"):
        return [known_quantization(name) for name in dict.fromkeys(names.split(","))]
    return [from_config(config)]


def plans(shape: ModelShape, values: dict[str, str], kinds: Sequence[Quantization | None]) -> list[Row]:
    """One row for each combination of machine, engine and quantization."""
    known = {name: load_engine(name) for name in chosen(values)}
    precision = _precision(values)
    rows = []
    for machine, device, link, number in machines(values):
        for (name, kind), quantization in product(known.items(), kinds):
            shown = ""
            if quantization is not None:
                shown = quantization.name
            elif "quantization" in values:
                shown = "none"
            if kind.planner_class is None:
                rows.append(Row(machine, name, "", shown, problem=NO_PLAN))
                continue
            if quantization is not None and "quantization" not in values:
                quantization = kind.kept(quantization) or quantization
            request = PlanRequest(
                shape=shape,
                engine=kind.planner_class(),
                alternatives=default_planners(),
                devices=number,
                device=device,
                link=link,
                dtype_bytes=precision.num_bytes,
                mixed_bytes=precision.mixed_bytes,
                quantization=quantization,
                num_nodes=_asked(values, "num_nodes"),
                batch_size=_asked(values, "batch_size"),
                prompt_tokens=_asked(values, "prompt_tokens"),
                max_new_tokens=_asked(values, "max_new_tokens"),
            )
            rows.append(_row(machine, shown, request, "machines" in values))
    return rows


def chosen(values: dict[str, str]) -> list[str]:
    """The requested engines, by default all that have weights and a planner; ConfigError for an unknown name."""
    with_weights = [name for name, kind in engines().items() if kind.needs_weights and kind.planner_class]
    asked = with_weights
    if "backend" in values:
        asked = values["backend"].split(",")
    if unknown := set(asked) - set(names()):
        hint = f"backend={','.join(with_weights)}"
        raise ConfigError(f"backend={','.join(sorted(unknown))} cannot be planned.", hint)
    return asked


def _row(machine: str, quantization: str, request: PlanRequest, is_named: bool) -> Row:
    """The plan of one choice; hints of errors are translated to the arguments of this command."""
    link, full = "", None
    if request.link and request.num_devices > 1:
        link = request.link.name
    try:
        plan = make_plan(request)
        if plan.largest_batch:
            full = make_plan(replace(request, batch_size=plan.largest_batch))
    except PlanError as error:
        hint = error.hint.replace("measure.batch_size=", "batch_size=")
        hint = re.sub(r"\bmachine=(\S+) precision=bf16 dry_run=true", r"machines=\1", hint)
        hint = re.sub(r"(?:with )?\bplain weights\b", "quantization=none", hint)
        hint = re.sub(r"(?:with )?\bweights in (\w+)", r"quantization=\1", hint)
        if is_named:
            hint = re.sub(r"\bdevices=(\d+)", rf"machines=\1x{machine.partition('x')[2]}", hint)
        problem = str(PlanError(error.fact, hint))
        return Row(machine, request.engine.name, link, quantization, problem=problem)
    return Row(machine, request.engine.name, link, quantization, plan, full)


def machines(values: dict[str, str]) -> list[tuple[str, Device, Link | None, int]]:
    """Name, device, link and number of devices per node of each requested machine, by default of this one.

    The link inside a node does not connect nodes: for several nodes only a requested link counts.
    """
    nodes = _asked(values, "num_nodes")
    chosen: list[tuple[str, Device, Link | None, int]]
    if "machines" in values:
        named = [machine_of(item, "machines") for item in values["machines"].split(",")]
        chosen = [(name, known_device(name), usual_link(name), n) for n, name in named]
    else:
        numbers = [_count("devices", n) for n in values.get("devices", "1").split(",")]
        if name := values.get("device"):
            chosen = [(name.lower(), known_device(name), usual_link(name), n) for n in numbers]
        else:
            on_cuda = bool(cuda_devices(os.environ))
            here = [(*this_machine(os.environ, n, on_cuda), n) for n in numbers]
            chosen = [(device.name, device, link, n) for device, link, n in here]
    if (most := nodes * max(n for *_, n in chosen)) > MOST_DEVICES:
        limit = MOST_DEVICES // nodes
        hint = f"devices={limit}"
        if "machines" in values:
            hint = f"machines={limit}x{chosen[0][0]}"
        raise ConfigError(f"{most} devices are more than {MOST_DEVICES}.", hint)
    figures = {key: values[key] for key in UNITS if key in values}
    rows = []
    for name, device, link, number in chosen:
        label = f"{number}x{name}"
        if nodes > 1:
            label, link = f"{nodes} x {label}", None
        if "link" in values:
            link = known_link(values["link"])
        device = described(device, figures, _precision(values).products.num_bytes)
        rows.append((label, device, link, number))
    return rows


def _precision(values: dict[str, str]) -> Precision:
    """The requested precision."""
    precision = values.get("precision", "bf16")
    if precision not in Precision.__members__:
        raise wrong_value("precision", precision, Precision)
    return Precision[precision]


def _asked(values: dict[str, str], key: str) -> int:
    return _count(key, values.get(key, str(COUNTS[key])))


def _count(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{key}={text} is not a whole number above 0.", f"{key}=2")
    return int(text)


def caption(values: dict[str, str], rows: Sequence[Row]) -> str:
    """A text about the columns, the assumed links, and the source of quantized weights."""
    tokens = f"{_asked(values, 'prompt_tokens')} + {_asked(values, 'max_new_tokens')} tokens"
    batch, precision = _asked(values, "batch_size"), values.get("precision", "bf16")
    text = (
        f"Of the fullest device, for {tokens} in batches of {batch}, {precision}. Other: activations, gathered layers, "
        "what engine and driver keep. Batch: the largest that fits (of each rank where ranks answer apart). "
        "Ceilings in tokens/s: per prompt in the batch asked for, and of all devices together in the largest; in bold "
        "the highest per prompt, to 1 %."
    )
    if links := ", ".join(dict.fromkeys(f"{row.machine} {row.link}" for row in rows if row.link)):
        text += f" Links: {links}."
    if "link" not in values and _asked(values, "num_nodes") > 1:
        text += " What joins the nodes is not known, and so no ceiling: link=NAME."
    if "quantization" in values:
        names = dict.fromkeys(row.quantization for row in rows if row.plan)
        text += "".join(f" {name}: {SOURCES[name]}." for name in names if name in SOURCES)
    return text


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
