"""Compare the figures of two records: faster or slower, by how much, and whether the difference exceeds the noise of
the repeats."""

from __future__ import annotations

import operator
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.config.schema import HOW_IT_IS_RUN
from launcher.config.values import flat
from launcher.results.comparison import Difference
from launcher.results.figures.cost import REPEATS
from launcher.results.figures.metrics import COUNTERS
from launcher.results.figures.serving import tpot_s
from launcher.system.gpu_users import is_of_a_neighbour
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from launcher.results.record import Record
    from shards.untrusted_files import JsonObject

SMALLEST = 0.02
"""Relative differences below this do not count: two starts of the same program can differ by as much."""

MARGINS = {2: 8.0, 3: 2.0, 4: 1.0}
MARGIN = 0.25
"""By number of repeats: the least gap between the ranges of two different figures, in units of the wider range. With
normal noise at most 1 of 250 pairs of equal runs exceeds it by chance."""

SPEEDS = ("new_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s")
TIMES = ("ttft_s", "itl_s", "tpot_s", "e2el_s", "load_s")
MEMORY = (
    "parameter_bytes", "kv_cache_bytes", "kv_cache_reserved_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "nvml_used_bytes", "host_anonymous_bytes",
)  # fmt: skip

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Values:
    """A figure of one run: its value, and the minimum and maximum over the repeats if there are several."""

    median: float
    min: float
    max: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Values:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class FigureChange:
    """One figure of two runs. `rank` is set for the memory figures of one rank's device. `ratio` is new over base, None
    if the base is 0.

    `is_different` is True if the difference exceeds the noise of the repeats; None for a figure with a single value,
    whose noise is not known.
    """

    name: str
    rank: int | None
    base: Values
    new: Values
    ratio: float | None
    is_different: bool | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit on the ratio (new over base) of a figure, as in `new_tokens_per_s<0.95`."""

    name: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse a rule; UserError for a malformed one or an unknown figure."""
        parts = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*(\d+(?:\.\d*)?|\.\d+)\s*", text)
        if parts is None:
            raise UserError(f"--fail-if {text!r} is not a figure, < or >, and a ratio.", f"--fail-if '{EXAMPLE}'")
        name, sign, limit = parts.groups()
        if name not in (*SPEEDS, *TIMES, *MEMORY, *COUNTERS):
            known = ", ".join((*SPEEDS, *TIMES, *MEMORY, *COUNTERS))
            raise UserError(f"--fail-if: {name} is not a figure.", f"one of {known}")
        return cls(name, sign, float(limit))

    def broken_by(self, changes: Iterable[FigureChange], names: str) -> list[str]:
        """A sentence for each change that breaks the rule; UserError if the figure was not measured in both runs."""
        ratios = [change for change in changes if change.name == self.name and change.ratio is not None]
        if not ratios:
            raise UserError(
                f"--fail-if: {self.name} was not measured in both runs ({names}).", f"--fail-if '{EXAMPLE}'"
            )
        sentences = []
        for change in ratios:
            if change.ratio is not None and OPERATORS[self.sign](change.ratio, self.limit):
                figure = change.name
                if change.rank is not None:
                    figure += f" of rank {change.rank}"
                limit = f"which is {self.sign} {self.limit:g}"
                sentences.append(f"{names}: {figure} is {change.ratio:.3f} of the base, {limit}.")
        return sentences


EXAMPLE = "new_tokens_per_s<0.95"


def changes(base: Record, new: Record) -> list[FigureChange]:
    """All figures that both runs have: speeds and times over their repeats, the load time, and the memory of each
    device."""
    ours, theirs = repeated(base), repeated(new)
    figures = [change_of(name, ours[name], theirs[name]) for name in ours if name in theirs]
    by_rank = {device.rank: device for device in new.devices}
    for device in base.devices:
        for name in MEMORY:
            before, after = getattr(device, name), getattr(by_rank.get(device.rank), name, None)
            if before is not None and after is not None:
                figures.append(change_of(name, (before,), (after,), device.rank))
    return figures


def repeated(record: Record) -> dict[str, tuple[float, ...]]:
    """The values of each speed, time and counter over the repeats; for quantiles the median of each repeat."""
    values: dict[str, tuple[float | None, ...]] = {}
    if record.metrics is not None:
        values |= {name: getattr(record.metrics, name).values for name in SPEEDS}
        by_number: dict[int, list[Any]] = {}
        for repeat in (repeat for rank in record.ranks for repeat in rank.repeats if repeat.completions):
            by_number.setdefault(repeat.number, []).append(repeat)
        parts = list(by_number.values())
        values |= {
            name: tuple(_middle(value for one in part for value in getattr(one, name)) for part in parts)
            for name in ("ttft_s", "itl_s", "e2el_s")
        }
        values["tpot_s"] = tuple(_middle(tpot_s(part)) for part in parts)
        values |= {name: record.metrics.counters[name].values for name in COUNTERS if name in record.metrics.counters}
    values["load_s"] = (record.load_s,)
    names = (*SPEEDS, *TIMES, *COUNTERS)
    known = {name: tuple(value for value in values.get(name, ()) if value is not None) for name in names}
    return {name: own for name, own in known.items() if own and len(own) == len(values[name])}


def _middle(values: Iterable[float]) -> float | None:
    known = list(values)
    if known:
        return statistics.median(known)
    return None


def change_of(name: str, base: Sequence[float], new: Sequence[float], rank: int | None = None) -> FigureChange:
    """One figure of two runs, from its values over the repeats."""
    ours, theirs = Values.of(base), Values.of(new)
    ratio = None
    if ours.median:
        ratio = theirs.median / ours.median
    elif not theirs.median:
        ratio = 1.0
    is_different = None
    repeats = min(ours.repeats, theirs.repeats)
    if repeats > 1:
        gap = max(theirs.min - ours.max, ours.min - theirs.max)
        widest = max(ours.max - ours.min, theirs.max - theirs.min)
        is_large = abs(theirs.median - ours.median) >= SMALLEST * ours.median
        is_different = is_large and gap > MARGINS.get(repeats, MARGIN) * widest
    return FigureChange(name, rank, ours, theirs, ratio, is_different, _verdict(name, ratio, is_different))


def _verdict(name: str, ratio: float | None, is_different: bool | None) -> str:
    if ratio is None:
        return "0 before"
    if ratio == 1:
        return "equal"
    if is_different is False:
        return "no difference beyond the spread"
    above, below = "more", "less"
    if name in SPEEDS:
        above, below = "faster", "slower"
    elif name in TIMES:
        above, below = "longer", "shorter"
    percent = abs(ratio - 1) * 100
    text = f"{percent:.2g} %"
    if percent >= 10:
        text = f"{percent:.0f} %"
    text += f" {above if ratio > 1 else below}"
    if is_different:
        return f"{text}, outside the spread of both"
    if name in MEMORY:
        return text
    return f"{text}, of single values: the spread is not known"


def circumstances(record: Record) -> JsonObject:
    """Everything that a figure may depend on, by dotted keys: configuration, versions, code, hardware, driver, other
    processes on the GPU."""
    values = flat({name: value for name, value in record.config.items() if name not in HOW_IT_IS_RUN})
    environment = record.environment
    if environment is not None:
        git, gpus, commit = environment.git, environment.gpus, None
        if git is not None:
            commit = git.commit[:12]
            if git.dirty:
                commit += " with changes"
        values |= {
            "launcher": environment.launcher,
            "commit": commit,
            "python": environment.python,
            **{f"version of {name}": version for name, version in environment.packages.items()},
            "host": environment.host,
            "platform": environment.platform,
            "cpu": environment.cpu,
            "cpu_count": environment.cpu_count,
            "gpus": gpus and ", ".join(name or "?" for name in gpus.names),
            "driver": gpus and gpus.driver,
            "cuda_driver": gpus and gpus.cuda_driver,
        }
    if (cost := record.cost) is not None:
        clocks = [sample.sm_clock_mhz for sample in cost.samples if sample.phase == REPEATS and sample.sm_clock_mhz]
        if clocks:  # rounded to 50 MHz, since clocks always differ slightly
            values["clock of the repeats"] = f"{round(statistics.median(clocks) / 50) * 50} MHz"
            values["clocks slowed by"] = ", ".join(cost.slowed_by) or None
    values["neighbours"] = "; ".join(note for note in record.notes if is_of_a_neighbour(note)) or None
    return values


def other_circumstances(base: Record, new: Record) -> list[Difference]:
    """The circumstances that differ between two runs, in the order of `circumstances`."""
    ours: Mapping[str, Any] = circumstances(base)
    theirs: Mapping[str, Any] = circumstances(new)
    keys = dict.fromkeys((*ours, *theirs))
    return [Difference(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]


@dataclass(frozen=True, slots=True)
class Changes:
    """One run compared with the base: the figures, and all other differences."""

    figures: list[FigureChange]
    circumstances: list[Difference]

    @classmethod
    def of(cls, base: Record, new: Record) -> Changes:
        return cls(changes(base, new), other_circumstances(base, new))
