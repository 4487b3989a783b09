"""Compare two finished runs: whether the answers are the same, and the ratio of their speeds. Does not import torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.config.engines import engines
from launcher.config.schema import HOW_IT_IS_RUN
from launcher.config.values import flat
from launcher.results.figures.quality import agreement, kl_divergence
from launcher.results.serving_cost import serving_cost
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from launcher.results.completions import ReportedCompletion
    from launcher.results.measured import Serving
    from launcher.results.record import Record
    from shards.untrusted_files import JsonObject

REPEATED_TOKENS = 8
"""A text is degenerate if this many tokens at its end are one token, or alternate between two."""

MOST_DISTINCTIONS = 3
"""The largest number of settings in the label of a run."""

WHERE_IT_RAN = ("backend", "devices", "num_nodes", "accelerator", "server", "slo", *HOW_IT_IS_RUN)


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A successful run, read from its directory; prompts and completions are by the index of the prompt."""

    run_dir: Path
    record: Record
    prompts: dict[int, tuple[int, ...]]
    completions: dict[int, ReportedCompletion]

    @property
    def label(self) -> str:
        """Engine and number of devices; for an endpoint the server that answered."""
        if (serving := self.serving) is not None:
            return f"{self.record.backend} ({serving.software or serving.dialect})"
        return f"{self.record.backend} x{self.record.num_devices}"

    @property
    def serving(self) -> Serving | None:
        """The measurements of the server, if there was one."""
        if self.record.metrics:
            return self.record.metrics.serving
        return None


@dataclass(frozen=True, slots=True)
class Divergence:
    """The position at which the two completions of a prompt diverge: from here a token differs, or is missing (None).

    If a server gave no token ids, `position` counts letters. `gap` is the difference of the two largest logits there,
    from the base if it exposes logits, else from the other run.
    """

    prompt: int
    position: int
    base_token: int | None
    other_token: int | None
    gap: float | None
    is_of_texts: bool = False


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens/s of the other run over those of the base: the ratio of the medians, and its minimum and maximum over all
    pairs of repeats."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that differs between the base and the other run."""

    key: str
    base: Any
    other: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run compared with the base. Prompts are named by index; `notes` are other reasons that limit the comparison.

    `serving_cost` is the share of the engine's tokens/s that is lost by serving it (HTTP, scheduler, client), None
    unless one run called a server of the other run's engine. `agreement` is the share of tokens in the text of
    `measure.quality` for which both models ranked the same token first, `kl_divergence` the divergence there of the
    base's distributions from the other's, in nats per token.
    """

    base: str
    other: str
    prompts: int
    matching: int
    divergences: tuple[Divergence, ...]
    base_degenerate: tuple[int, ...]
    other_degenerate: tuple[int, ...]
    speed: Ratio
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    serving_cost: float | None = None
    agreement: float | None = None
    kl_divergence: float | None = None

    @property
    def match(self) -> float:
        """The share of prompts whose tokens are exactly the same."""
        return self.matching / self.prompts


def compare(base: FinishedRun, other: FinishedRun) -> Comparison:
    """Compare `other` with `base`; UserError if their prompts differ."""
    if base.prompts != other.prompts:
        same = sum(base.prompts[index] == other.prompts.get(index) for index in base.prompts)
        raise UserError(
            f"{base.run_dir.name} has {len(base.prompts)} prompts, {other.run_dir.name} {len(other.prompts)}, "
            f"and {same} of them are the same token ids.",
            "compare runs of one model and one prompt set",
        )
    ours, theirs = _speeds(base), _speeds(other)
    speed = Ratio(statistics.median(theirs) / statistics.median(ours), min(theirs) / max(ours), max(theirs) / min(ours))
    notes = _other_weights(base, other)
    cost, no_cost = serving_cost(base.record, other.record, speed.median)
    if no_cost:
        notes.append(no_cost)
    parted = (_divergence(index, row, other.completions[index]) for index, row in sorted(base.completions.items()))
    divergences = tuple(divergence for divergence in parted if divergence is not None)
    return Comparison(
        base=str(base.run_dir),
        other=str(other.run_dir),
        prompts=len(base.prompts),
        matching=len(base.prompts) - len(divergences),
        divergences=divergences,
        base_degenerate=_degenerate(base),
        other_degenerate=_degenerate(other),
        speed=speed,
        differences=tuple(_differences(_settings(base), _settings(other))),
        notes=tuple(notes),
        serving_cost=cost,
        agreement=agreement(base.record.quality, other.record.quality),
        kl_divergence=kl_divergence(base.record.quality, other.record.quality),
    )


def _other_weights(base: FinishedRun, other: FinishedRun) -> list[str]:
    """A note if an engine generates its own random weights, which differ with the number of devices."""
    runs = (base, other)
    are_random = all(run.record.config["model"].get("weights") == "random" for run in runs)
    labels = {run.label for run in runs}
    kinds = engines()
    backends = [
        run.record.backend for run in runs if getattr(kinds.get(run.record.backend), "own_random_weights", False)
    ]
    if not are_random or len(labels) == 1 or not backends:
        return []
    return [f"the random weights of {backends[0]} differ by engine and device count; the tokens are not comparable"]


def _divergence(index: int, base: ReportedCompletion, other: ReportedCompletion) -> Divergence | None:
    if base.is_text_only or other.is_text_only:
        position = _parting(base.text, other.text)
        if position is None:
            return None
        return Divergence(index, position, None, None, None, is_of_texts=True)
    ours, theirs = base.token_ids, other.token_ids
    if (position := _parting(ours, theirs)) is None:
        return None
    gaps = (row.top2_gaps[position] for row in (base, other) if position < len(row.top2_gaps))
    tokens = [next(iter(ids[position:]), None) for ids in (ours, theirs)]
    return Divergence(index, position, tokens[0], tokens[1], next(gaps, None))


def _parting(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
    """The first position at which two sequences differ, None if they do not."""
    if ours == theirs:
        return None
    shorter = min(len(ours), len(theirs))
    return next((at for at in range(shorter) if ours[at] != theirs[at]), shorter)


def is_degenerate(token_ids: Sequence[int], finish_reason: str) -> bool:
    """True if the last REPEATED_TOKENS tokens, without the EOS token, are one token, or alternate between two."""
    if finish_reason == "stop":
        token_ids = token_ids[:-1]
    tail = list(token_ids[-REPEATED_TOKENS:])
    return len(tail) == REPEATED_TOKENS and tail[2:] == tail[:-2]


def _degenerate(run: FinishedRun) -> tuple[int, ...]:
    rows = sorted(run.completions.items())
    return tuple(index for index, row in rows if is_degenerate(row.token_ids, row.finish_reason))


def _speeds(run: FinishedRun) -> list[float]:
    assert run.record.metrics is not None, "a run that ended well has been measured"
    return [value for value in run.record.metrics.new_tokens_per_s.values if value is not None]


def _settings(run: FinishedRun) -> JsonObject:
    """The settings that determine the tokens and how they were timed: all but the engine and the devices."""
    return {name: value for name, value in run.record.config.items() if name not in WHERE_IT_RAN}


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield Difference(f"{prefix}{name}", a, b)


def labels(runs: Sequence[FinishedRun]) -> list[str]:
    """A unique label for each run: engine and devices, then the settings that differ, then the directory."""
    names = [run.label for run in runs]
    for suffixes in (_distinctions, lambda group: [run.run_dir.name for run in group]):
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(name, []).append(index)
        for group in groups.values():
            if len(group) > 1:
                for index, more in zip(group, suffixes([runs[index] for index in group]), strict=True):
                    names[index] = f"{names[index]} {more}".rstrip()
    return names


def _distinctions(runs: Sequence[FinishedRun]) -> list[str]:
    """For runs with the same label, the settings that differ between them; for a group with another option only the
    option."""
    settings = [flat({k: v for k, v in run.record.config.items() if k not in HOW_IT_IS_RUN}) for run in runs]
    keys = [key for key in settings[0] if any(other.get(key) != settings[0][key] for other in settings)]
    options = {key.removesuffix(".name") for key in keys if key.endswith(".name")}
    told = [key for key in keys if key.endswith(".name") or key.rpartition(".")[0] not in options][:MOST_DISTINCTIONS]
    return [" ".join(f"{key.removesuffix('.name')}={values.get(key)}" for key in told) for values in settings]


def alike(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """The runs that can be compared: groups of two or more with the same model and the same prompt ids, in order."""
    groups: list[list[FinishedRun]] = []
    for run in runs:
        for group in groups:
            if _weights(group[0]) == _weights(run) and group[0].prompts == run.prompts:
                group.append(run)
                break
        else:
            groups.append([run])
    return [group for group in groups if len(group) > 1]


def _weights(run: FinishedRun) -> JsonObject:
    """The model of a run, without its display name."""
    return {name: value for name, value in run.record.config["model"].items() if name != "name"}
