"""Expand a sweep to its points, which are counted before they are created."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

from launcher.composition.overrides import readable
from launcher.composition.presets import options
from launcher.composition.quoting import for_shell
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_POINTS = 10_000


def expand_sweep(overrides: list[str], config_dirs: Sequence[str] = ()) -> list[list[str]]:
    """The points of `-m a=1,2 b=x,y`, each as a list of overrides; the last key varies fastest.

    ConfigError for an empty or infinite axis, and for more than MOST_POINTS points.
    """
    overrides = readable(overrides)
    parsed = OverridesParser.create().parse_overrides(overrides)
    counts = [_count(override, config_dirs) for override in parsed]
    if math.prod(counts) > MOST_POINTS:
        most, widest = max(zip(counts, parsed, strict=True), key=lambda axis: axis[0])
        fact = f"That is a sweep of {math.prod(counts):,} points, more than {MOST_POINTS:,}."
        room = MOST_POINTS // (math.prod(counts) // most)
        raise ConfigError(fact, for_shell(f"{widest.get_key_element()}=range(0,{max(room, 1)})"))
    axes = []
    for text, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override():
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([text])
    return [list(point) for point in itertools.product(*axes)]


def _count(override: Override, config_dirs: Sequence[str]) -> int:
    """The number of points of one axis; 1 for an override with a single value."""
    if not override.is_sweep_override():
        return 1
    key, values = override.get_key_element(), override.value()
    text = f"{key}={override.get_value_string()}"
    if isinstance(values, IntervalSweep):
        raise ConfigError(f"{text} has no points: an interval is for a search.", f"{key}=1,2")
    if isinstance(values, Glob):
        names = values.filter(options(key, config_dirs))
        raise ConfigError(f"{text} is not used: a sweep names its points.", f"{key}={','.join(names) or 'a,b'}")
    if isinstance(values, ChoiceSweep):
        return len(values.list)
    assert isinstance(values, RangeSweep), "there are four kinds of sweeps"
    start, stop, count = values.start or 0, values.stop or 0, 0
    if all(map(math.isfinite, (start, stop, values.step))) and values.step != 0:
        with contextlib.suppress(OverflowError):
            count = math.ceil((stop - start) / values.step)
    if count < 1:
        raise ConfigError(f"{text} has no points, or no end.", f"{key}=1,2")
    return count
