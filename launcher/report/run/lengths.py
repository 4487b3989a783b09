"""The lengths of a prompt set on one line: minimum, median, maximum, and a small histogram."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from launcher.report.layout import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.base import Prompt

BARS = "▁▂▃▄▅▆▇█"
MOST_BINS = 16


def lengths_line(prompts: Sequence[Prompt]) -> str:
    """`prompts: 4 of 5 to 8 tokens, median 6, 26 together  5 ▅▅▁█ 8`; each bar covers an equal range of lengths."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    least, most = min(lengths), max(lengths)
    together = f"{sum(lengths):,} together"
    if least == most:
        return f"prompts: {len(lengths):,} of {counted(least, 'token')}, {together}"
    line = f"prompts: {len(lengths):,} of {least:,} to {most:,} tokens, median {statistics.median(lengths):,.0f}"
    return f"{line}, {together}  {least:,} {histogram(lengths)} {most:,}"


def histogram(lengths: Sequence[int]) -> str:
    """A bar for each of several equal ranges from the minimum to the maximum; an empty range is a space."""
    least, most = min(lengths), max(lengths)
    width = -(-(most - least + 1) // MOST_BINS)
    counts = [0] * (-(-(most - least + 1) // width))
    for length in lengths:
        counts[(length - least) // width] += 1
    highest = max(counts)
    return "".join(BARS[(len(BARS) - 1) * count // highest] if count else " " for count in counts)
