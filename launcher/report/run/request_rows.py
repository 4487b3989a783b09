"""The rows of a report about requests: rates and times, the server, and the client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.report.units import rate, seconds

if TYPE_CHECKING:
    from launcher.results.measured import Metrics, Quantiles, Serving, Spread

    Row = list[str] | None


MANY_TOGETHER = 0.1  # from this share of parts that arrived together on, inter-token times mean little


def rate_rows(metrics: Metrics, repeats: str) -> list[Row]:
    """Requests per second, and those within the latency limits."""
    rates: dict[str, Spread | None] = {
        "requests/s": metrics.request_throughput,
        "good requests/s": metrics.request_goodput,
    }
    rows: list[Row] = []
    for label, spread in rates.items():
        if spread is not None:
            rows.append([label, rate(spread.median), rate(spread.min), rate(spread.max), repeats])
    if (share := metrics.slo_attainment) is not None:
        median, least, most = (f"{value:.1%}" for value in (share.median, share.min, share.max) if value is not None)
        rows.append(["within the limits", median, least, most, repeats])
    return rows


def time_rows(metrics: Metrics) -> list[Row]:
    """The time of a token after the first, and of a request to its last token."""
    times: dict[str, Quantiles | None] = {"time per output token": metrics.tpot_s, "request latency": metrics.e2el_s}
    rows: list[Row] = []
    for label, quantiles in times.items():
        if quantiles is not None:
            parts = map(seconds, (quantiles.p50, quantiles.p90, quantiles.p99))
            rows.append([label, *parts, f"{quantiles.count} values"])
    return rows


def serving_rows(serving: Serving) -> list[Row]:
    """The server, which parts of its answers were checked, the failures, and the client's cost."""
    name = serving.software or serving.dialect
    checked = f"checked: {serving.tokens_checked}"
    if serving.read_otherwise:
        checked += f", {serving.read_otherwise} prompts tokenized differently"
    if (serving.bunched or 0) >= MANY_TOGETHER:
        checked += f", {serving.bunched:.0%} of the parts arrived together"
    rows: list[Row] = [["server", name, "", "", checked]]
    if serving.failures:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(serving.failures.items()))
        rows.append(
            ["[red]failed requests[/]", str(sum(serving.failures.values())), "", "", f"of {serving.requests}: {kinds}"]
        )
    client = f"late by {seconds(serving.loop_lag_s[0])} p50, {seconds(serving.loop_lag_s[1])} p99"
    if serving.client_bound:
        client = f"[red]{serving.client_bound}[/]"
    rows.append(["client", f"{serving.cpu_share:.1%} of a core", "", "", client])
    if metrics := serving.own_metrics:
        known = {"ttft_s": "ttft", "itl_s": "itl", "e2el_s": "latency", "queue_s": "queue"}
        means = ", ".join(f"{label} {seconds(metrics[name])}" for name, label in known.items() if name in metrics)
        rows.append(["means by the server", "", "", "", means])
    return rows
