"""The cost of a run as rows of its table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.report.units import seconds

if TYPE_CHECKING:
    from launcher.results.figures.cost import Cost


def cost_rows(cost: Cost) -> list[list[str]]:
    """CPU time; energy if it could be read, and money if a price is configured."""
    processors = f"user {seconds(cost.user_s)}, system {seconds(cost.system_s)}"
    rows = [["processor time", seconds(cost.user_s + cost.system_s), "", "", processors]]
    if cost.joules_per_token is not None:
        source = f"{cost.energy_source}"
        if cost.watts is not None:
            source += f", {cost.watts:,.0f} W"
        rows.append(["energy a token", f"{cost.joules_per_token:,.3g} J", "", "", source])
    if cost.per_million_tokens is not None:
        price = f"at {cost.device_hour:g} a device and hour"
        rows.append(["cost of a million tokens", f"{cost.per_million_tokens:,.3g}", "", "", price])
    return rows
