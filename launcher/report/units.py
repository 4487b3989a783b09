"""Figures with their units, as text."""

from __future__ import annotations

from shards.machine.hardware import GIB, MIB


def size(value: int | None) -> str:
    """Bytes in MiB or GiB; a dash for None."""
    if value is None:
        return "-"
    if value >= GIB:
        return f"{value / GIB:,.2f} GiB"
    return f"{value / MIB:,.2f} MiB"


def seconds(value: float | None) -> str:
    """Seconds, or milliseconds for values below one second; a dash for None."""
    if value is None:
        return "-"
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1000:,.2f} ms"


def rate(value: float | None) -> str:
    """Tokens per second."""
    if value is None:
        return "-"
    if value >= 10:
        return f"{value:,.1f}"
    return f"{value:,.3f}"


def count(value: float | None) -> str:
    """A count, as text."""
    return figure(value, ",.10g")


def percent(value: float | None) -> str:
    """A share in percent."""
    return figure(value, ".1%")


def figure(value: float | None, form: str, unit: str = "") -> str:
    """A figure in a format, with its unit; a dash for None."""
    if value is None:
        return "-"
    return f"{value:{form}} {unit}".rstrip()
