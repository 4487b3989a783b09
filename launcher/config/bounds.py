"""Which values a run can have: the bounds of every number of its configuration, and what does not go together."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.config.schema import ConfigError
from shards.plan.request import MOST_DEVICES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.config.schema import PromptsConfig, RunConfig


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a finite number: from `least`, which `is_open` leaves out, to `most`."""

    least: int
    most: int | None = None
    is_open: bool = False

    def has(self, value: float) -> bool:
        """Whether a value is within them."""
        is_enough = value > self.least if self.is_open else value >= self.least
        return math.isfinite(value) and is_enough and (self.most is None or value <= self.most)

    def nearest(self, value: float) -> int:
        """A value within them, for one that is not."""
        if self.most is not None and value > self.most:
            return self.most
        return self.least + 1 if self.is_open else self.least

    def beside(self, value: float) -> str:
        """The bounds in words, for a value that is not within them; one that is there for safety where it is passed."""
        most = self.most if self.most is not None and (self.most < MOST_TIMES or value > self.most) else None
        if self.is_open:
            return f"above {self.least}" + ("" if most is None else f" and at most {most}")
        return f"of {self.least} or more" if most is None else f"from {self.least} to {most}"


MOST = 2**31 - 1
MOST_BYTES = 2**50
MOST_SECONDS = 10**9
MOST_TOKENS = 10**7
"""Of the prompts of a set together: random ids are drawn in three seconds, and take 400 MB."""

MOST_PROMPTS = 10**5
MOST_TIMES = 10**5

COUNT, NOT_NEGATIVE, SHARE = Bounds(1, MOST), Bounds(0, MOST), Bounds(0, 1, is_open=True)
SECONDS, TOKENS = Bounds(0, MOST_SECONDS), Bounds(1, MOST_TOKENS)

BOUNDS: dict[str, Bounds] = {
    "devices": Bounds(1, MOST_DEVICES),
    "num_nodes": Bounds(1, MOST_DEVICES),
    "seed": Bounds(0, 2**32 - 1),  # with a prompt's index below it, it is torch's 64 bits; numpy takes no more either
    "hang_timeout_s": SECONDS,
    "timeout_s": SECONDS,
    "prompts.count": Bounds(1, MOST_PROMPTS),
    "prompts.input_tokens": TOKENS,
    "prompts.output_tokens": TOKENS,
    "sampling.max_new_tokens": TOKENS,
    "sampling.temperature": NOT_NEGATIVE,
    "sampling.top_p": SHARE,
    "sampling.top_k": NOT_NEGATIVE,
    "measure.batch_size": COUNT,
    "measure.warmup": Bounds(0, MOST_TIMES),
    "measure.repeats": Bounds(1, MOST_TIMES),
    "launch.poll_s": Bounds(0, MOST_SECONDS, is_open=True),
    "launch.node_rank": NOT_NEGATIVE,
    "cluster.cpus_per_task": COUNT,
    "cluster.signal_s": Bounds(0, 65535),  # as sbatch takes it
    "cluster.max_requeues": NOT_NEGATIVE,
    "cluster.array_limit": COUNT,
    "backend.step_s": SECONDS,
    "backend.fail_after": NOT_NEGATIVE,
    "backend.memory_batch": NOT_NEGATIVE,
    "backend.max_out_tokens": COUNT,
    "backend.gpu_memory_utilization": SHARE,
    "backend.kv_cache_memory_bytes": Bounds(1, MOST_BYTES),
    "backend.max_num_seqs": COUNT,
    "backend.max_model_len": COUNT,
}
"""The bounds of each number by its key, whichever engine has it; a key that may be null is checked where it is not."""


CHOICES = {
    "device_map": ("auto", "balanced", "balanced_low_0", "sequential"),
    "fail_at": ("", "load", "generate", "hang"),
}
"""The texts that an option of an engine can be."""


def check(config: RunConfig) -> None:
    """Raise ConfigError for a value that no run can have."""
    for name, choices in CHOICES.items():
        if (value := getattr(config.backend, name, choices[0])) not in choices:
            known = [choice for choice in choices if choice]
            raise ConfigError(f"backend.{name}={value} is not one of {', '.join(known)}.", f"backend.{name}={known[0]}")
    for key, value in numbers(config):
        bounds = BOUNDS[key]
        if not bounds.has(value):
            raise ConfigError(
                f"{key}={value} is not a number {bounds.beside(value)}.", f"{key}={bounds.nearest(value)}"
            )
    if (size := config.devices * config.num_nodes) > MOST_DEVICES:
        hint = f"devices={MOST_DEVICES // config.num_nodes}"
        raise ConfigError(f"devices x num_nodes is {size}, more than {MOST_DEVICES}.", hint)
    if config.measure.find_batch_size and config.backend.continuous_batching:
        name = config.backend.name
        raise ConfigError(f"{name} makes its batches itself: there is none to find.", "measure.find_batch_size=false")
    if config.measure.find_batch_size and config.launch.name != "local":
        raise ConfigError("measure.find_batch_size needs launch=local: each try waits for the last.", "launch=local")
    _check_prompts(config.prompts)


def _check_prompts(wanted: PromptsConfig) -> None:
    """A prompt set has one source, its texts, a file or random ids: another one would be passed over."""
    path, length, count = wanted.path, wanted.input_tokens, wanted.count
    if path is not None and (wanted.texts is not None or length is not None):
        fact = f"prompts={wanted.name} has prompts of its own, and does not read prompts.path={path}."
        raise ConfigError(fact, f"prompts=file prompts.path={path}")
    if length is not None and (wanted.texts is not None or count is None):
        fact = f"prompts.input_tokens={length} is the length of random prompts, and prompts={wanted.name} has others."
        raise ConfigError(fact, f"prompts=synthetic prompts.input_tokens={length}")
    if count is not None and length is None:
        fact = f"prompts.count={count} is the number of random prompts, and prompts={wanted.name} has others."
        raise ConfigError(fact, f"prompts=synthetic prompts.count={count}")
    if count is not None and length is not None and count * length > MOST_TOKENS:
        fact = f"prompts.count={count} of prompts.input_tokens={length} are {count * length:,} tokens, more than "
        raise ConfigError(f"{fact}{MOST_TOKENS:,}.", f"prompts.count={max(MOST_TOKENS // length, 1)}")


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a configuration by their keys; what an engine or a model is given as it is (dicts) is not ours."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{item.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + item.name, value
