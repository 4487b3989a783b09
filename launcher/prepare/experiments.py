"""Compare published measurements with the limits of their hardware."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.config.machine import machine_of
from launcher.config.schema import ConfigError
from launcher.prepare.shapes import built_of
from shards.errors import PlanError
from shards.machine.hardware import known_device, usual_link
from shards.model.known_shape import KNOWN_FAMILIES
from shards.plan.plan import Plan, make_plan
from shards.plan.request import PlanRequest

if TYPE_CHECKING:
    from launcher.config.parts.experiment import FigureConfig
    from launcher.config.schema import RunConfig
    from launcher.results.record import Record

FASTEST_OF_THE_TIME = "h100"
"""The GPU with the highest bandwidth when the articles were written: gives a limit if an article names no hardware."""

BYTES_OF_A_LETTER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class PublishedFigure:
    """A published figure, the best value that its hardware allows, and the share of it that was reached.

    `limit` is in the unit of the figure: the highest tokens/s, the shortest time, or the planned memory; None if not
    known. `objection` is a calculation that shows why the figure cannot be true.
    """

    name: str
    value: float
    unit: str
    limit: float | None = None
    share: float | None = None
    objection: str | None = None


def check_experiment(config: RunConfig) -> None:
    """Raise ConfigError for an experiment that needs an option that this launcher does not have yet."""
    experiment = config.experiment
    if experiment.name is not None and experiment.needs:
        raise ConfigError(
            f"experiment={experiment.name} needs {' and '.join(experiment.needs)}, which is not supported yet.",
            "python -m launcher.experiments shows those that can be made",
        )


def published_plan(config: RunConfig, hardware: str) -> Plan | None:
    """The plan of an experiment on `hardware`.

    None if the engine has no planner, the model does not fit, or the model's config or the prompts are not available.
    """
    if config.model.config is None or not config.prompts.texts:
        return None
    number, card = machine_of(hardware)
    planner = config.backend.planner(config, config.model.config, on_cuda=True)
    if planner is None:
        return None
    texts = config.prompts.texts
    try:
        shape = built_of(config.model.config).shape
    except PlanError:  # transformers cannot determine the shapes
        return None
    request = PlanRequest(
        shape=shape,
        engine=planner,
        devices=number,
        dtype_bytes=config.precision.num_bytes,
        mixed_bytes=config.precision.mixed_bytes,
        quantization=config.backend.quantization(config, None, on_cuda=True),
        batch_size=len(texts),
        prompt_tokens=max(len(text) // BYTES_OF_A_LETTER_TOKEN + 1 for text in texts),
        max_new_tokens=config.sampling.max_new_tokens,
        device=known_device(card),
        link=usual_link(card),
    )
    try:
        return make_plan(request)
    except PlanError:
        return None


def published_figures(config: RunConfig, asks: bool = True) -> list[PublishedFigure]:
    """The figures of an experiment with the limits of its hardware, or of the fastest hardware of its time.

    With `asks=False`, limits are left out for models whose shapes only transformers knows, since asking it takes time.
    """
    experiment = config.experiment
    hardware = experiment.hardware or f"{config.devices}x{FASTEST_OF_THE_TIME}"
    is_known = asks or (config.model.config or {}).get("model_type") in KNOWN_FAMILIES
    plan = None
    if is_known and not experiment.needs:
        plan = published_plan(config, hardware)
    is_named = experiment.hardware is not None
    return [_against(figure, config, plan, hardware, is_named) for figure in experiment.figures]


def _against(
    figure: FigureConfig, config: RunConfig, plan: Plan | None, hardware: str, is_named: bool
) -> PublishedFigure:
    published = PublishedFigure(figure.name, figure.value, figure.unit)
    if plan is None or plan.limit is None or plan.prefill_limit is None:
        return published
    sequences, tokens = len(config.prompts.texts or []), config.sampling.max_new_tokens
    step_s = plan.limit.seconds
    if figure.name == "new_tokens_per_s":
        most = sequences / step_s
        if figure.value > most:
            objection = f"{hardware} reaches at most {most:.3g} tokens/s, bound by {plan.limit.bound}"
            if plan.limit.bound == "link":
                objection += f": its cards must have a faster link than {usual_link(machine_of(hardware)[1]).name}"
            return replace(published, limit=most, objection=objection)
        if is_named:
            return replace(published, limit=most, share=figure.value / most)
    if figure.name == "generation_s":
        least = plan.prefill_limit.seconds + (tokens - 1) * step_s
        if figure.value < least:
            steps = int(figure.value / step_s)
            objection = (
                f"{tokens} tokens take {least:.2g} s at least on {hardware}, {1000 * step_s:.3g} ms a step: "
                f"{figure.value:g} s are {steps} steps"
            )
            return replace(published, limit=least, objection=objection)
        if is_named:
            return replace(published, limit=least, share=least / figure.value)
    if figure.name == "peak_memory_gb":
        device = plan.devices[0]
        planned = (device.used_bytes - device.overhead_bytes) / 1e9
        return replace(published, limit=planned, share=figure.value / planned)
    return published


def measured_figure(name: str, record: Record) -> float | None:
    """The measured counterpart of a published figure, in the figure's unit; None if it was not measured."""
    metrics = record.metrics
    if name == "new_tokens_per_s":
        return record.new_tokens_per_s
    if name == "generation_s" and metrics is not None:
        return metrics.wall_s.median
    if name == "load_s":
        return record.load_s
    if name in ("user_s", "system_s") and record.cost is not None:
        return {"user_s": record.cost.user_s, "system_s": record.cost.system_s}[name]
    peaks = [device.peak_allocated_bytes for device in record.devices if device.peak_allocated_bytes is not None]
    if name == "peak_memory_gb" and peaks:
        return max(peaks) / 1e9
    return None
