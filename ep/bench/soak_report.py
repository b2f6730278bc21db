"""What `ep bench soak` says: its table and the plot of memory over time."""

from __future__ import annotations

from ep.bench.page import Report
from ep.bench.plot import COLOURS, Figure, Series
from ep.bench.soak import MAX_GROWTH, SoakBench
from ep.sheet import Sheet

_MAX_POINTS = 120


def describe(result: SoakBench) -> Report:
    options = result.options
    rows = tuple(
        (
            one.name,
            f"{one.before_mib:,.1f}",
            f"{one.after_mib:,.1f}",
            f"{one.after_mib - one.before_mib:+.2f}",
            f"{one.growth:+.2%}{' (!)' if one.growth > MAX_GROWTH else ''}",
        )
        for one in result.growths
    )
    title = f"Own memory after {options.warm_up_minutes:g} minutes and at the end of {options.minutes:g}, MiB"
    note = (
        "Own memory: anonymous, and a share of what is shared; mapped files are left out. Medians of the first and the "
        f"last fifth of the time after the warm-up. {result.num_requests:,} requests, {result.num_failed} failed, "
        f"{result.output_tokens_per_s:,.0f} output tokens/s."
    )
    summary = (
        f"{result.hosts}, {options.shards_per_node} shards on each; {options.concurrency} requests at a time for "
        f"{options.minutes:g} minutes, prompts of up to {options.input_len} and answers of up to {options.output_len} "
        "tokens."
    )
    sheet = Sheet(title, ("process", "before", "after", "difference", "growth"), rows, note)
    notes = tuple(f"Failed: {error}" for error in result.errors)
    return Report("A long run on several hosts", (sheet,), (_figure(result),), summary, notes)


def _figure(result: SoakBench) -> Figure:
    """The largest processes, as many as there are colours."""
    largest = sorted(result.processes, key=lambda process: -max(process.mib))[: len(COLOURS)]
    every = max(1, len(result.times) // _MAX_POINTS)
    series = tuple(
        Series(
            process.name,
            tuple(round(time / 60, 2) for time in result.times[process.first :][: len(process.mib)][::every]),
            process.mib[::every],
        )
        for process in largest
    )
    return Figure("memory", "Own memory of the largest processes", "minutes", "MiB", series)
