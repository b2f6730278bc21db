"""What `ep bench serve` found, as tables and plots."""

from __future__ import annotations

from collections.abc import Sequence

from ep.bench.page import Report, incomplete
from ep.bench.plot import Figure, Series
from ep.bench.rounds import Measured, idle_cores
from ep.bench.serve import OUTPUT_LEN, ServeBench
from ep.report.units import plural
from ep.sheet import Sheet

LATENCIES = ("ttft", "tpot", "itl")
PERCENTILES = ("p50", "p90", "p99")


def describe(result: ServeBench) -> Report:
    """One point: all its figures, a row each. Several: a row for each point and server, and plots over the points."""
    options, points = result.options, result.points
    if options.prompts is not None:
        lengths = f"the prompts of a file, {options.output_len or 'its own'} output tokens"
    else:
        lengths = f"{options.input_len} + {options.output_len or OUTPUT_LEN} tokens"
    what = f"{options.model}: {lengths}, median of {_num_rounds(points)}"
    if options.one_by_one:
        what += ", one server after the other"
    beside = " beside native vLLM" if points[0].ratio else ""
    sheet = _one(f"{points[0].point.label}, {what}", points[0]) if len(points) == 1 else _sweep(what, points)
    report = Report(f"Serving {options.model}{beside}", (sheet,), tuple(_figures(points)))
    return incomplete(report, result.incomplete)


def _num_rounds(points: Sequence[Measured]) -> str:
    """Of a server at a point; where one was interrupted the last points may have one less."""
    counts = {len(measured.rounds) // len(measured.servers) for measured in points}
    return plural(counts.pop(), "round") if len(counts) == 1 else f"{min(counts)} to {max(counts)} rounds"


def _one(title: str, measured: Measured) -> Sheet:
    """The figures of one point, a column for each server."""
    ratio, servers = measured.ratio, list(measured.servers.values())
    rows: list[tuple[str, ...]] = []

    def row(label: str, values: Sequence[float], digits: int, quotient: float | None = None) -> None:
        cells = [f"{value:,.{digits}f}" for value in values]
        if ratio:
            cells.append(f"{quotient if quotient is not None else values[0] / values[1]:.2f}")
        rows.append((label, *cells))

    def words(label: str, cells: Sequence[str], last: str = "") -> None:
        rows.append((label, *cells, *([last] if ratio else [])))

    served = [server.served for server in servers]
    row("output tokens/s", [s.output_tokens_per_s for s in served], 0, ratio.median if ratio else None)
    spread = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else ""
    words("  lowest to highest round", [f"{s.slowest:,.0f} to {s.fastest:,.0f}" for s in servers], spread)
    row("total tokens/s", [s.total_tokens_per_s for s in served], 0)
    row("requests/s", [s.requests_per_s for s in served], 2)
    for name in LATENCIES:
        for p in PERCENTILES:
            row(f"{name.upper()} {p}, ms", [getattr(getattr(s, f"{name}_ms"), p) for s in served], 1)
    for label in sorted({label for s in servers for label, cpu_s in s.cpu_s_per_1000_tokens.items() if cpu_s >= 0.005}):
        values = [s.cpu_s_per_1000_tokens.get(label, 0.0) for s in servers]
        words(f"CPU s per 1000 tokens: {label}", [f"{value:.2f}" if value else "" for value in values])
    totals = [sum(s.cpu_s_per_1000_tokens.values()) for s in servers]
    if all(totals):
        row("CPU s per 1000 tokens: all", totals, 2)
    if ratio and any(one.idle_cores for one in measured.rounds):
        words("cores used while the other runs", [f"{idle_cores(measured.rounds, n):.2f}" for n in measured.servers])
    columns = ("", *measured.servers, *(("ep / native",) if ratio else ()))
    return Sheet(title, columns, tuple(rows))


def _sweep(title: str, points: Sequence[Measured]) -> Sheet:
    rows = []
    for measured in points:
        for name, summary in measured.servers.items():
            served, ratio = summary.served, measured.ratio
            figures = [f"{served.requests_per_s:.2f}", f"{served.output_tokens_per_s:,.0f}"]
            figures.append(f"{served.total_tokens_per_s:,.0f}")
            figures += [
                f"{getattr(getattr(served, f'{latency}_ms'), p):,.1f}" for latency in LATENCIES for p in PERCENTILES
            ]
            if points[0].ratio:
                of_ep = name == "ep" and ratio is not None
                figures.append(f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if of_ep and ratio else "")
            rows.append((measured.point.label, name, *figures))
    latencies = [f"{latency.upper()} {p}" for latency in LATENCIES for p in PERCENTILES]
    columns = ("load", "server", "req/s", "output tok/s", "total tok/s", *latencies)
    if points[0].ratio:
        columns = (*columns, "ep / native")
    note = "TTFT, TPOT and ITL in ms."
    if points[0].ratio:
        note += " ep / native: output tokens per second, the median of the rounds' ratios, lowest to highest."
    # A narrow terminal shows what loads are compared by; the page and the JSON have the rest.
    return Sheet(title, columns, tuple(rows), note, text_columns=2, spare=(2, 4, 6, 9, 11, 12))


def _figures(points: Sequence[Measured]) -> list[Figure]:
    places = tuple(measured.point.label for measured in points)
    kind = "lines" if len(points) > 1 else "bars"
    throughput, latency = [], []
    for name in points[0].servers:
        summaries = [measured.servers[name] for measured in points]
        speeds = tuple(summary.served.output_tokens_per_s for summary in summaries)
        low, high = (tuple(getattr(summary, end) for summary in summaries) for end in ("slowest", "fastest"))
        throughput.append(Series(name, places, speeds, low, high))
        for p in ("p50", "p99"):
            values = tuple(getattr(summary.served.itl_ms, p) for summary in summaries)
            latency.append(Series(f"{name}, {p}", places, values))
    return [
        Figure("throughput", "Throughput, with the rounds' range", "", "output tokens/s", tuple(throughput), kind),
        Figure("itl", "Time between two tokens of a request", "", "ms", tuple(latency), kind),
    ]
