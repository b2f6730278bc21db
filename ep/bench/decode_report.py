"""What `ep bench decode-latency` found, as a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ep.bench.decode_latency import DecodeLatency, LatencyAt
from ep.bench.page import Report
from ep.bench.plot import Figure, Series
from ep.bench.profile_gpu import IDLE
from ep.sheet import Sheet


def describe(result: DecodeLatency) -> Report:
    """A column for each input length: our step, its parts, native's step."""
    options, lengths = result.options, result.lengths
    title = (
        f"{options.model}: ms a decode step, batch {result.batch_size}, {result.output_len} steps, median of "
        f"{options.rounds} rounds"
    )
    columns = ("input length, tokens", *(f"{at.input_len:,}" for at in lengths))
    sheet = Sheet(title, columns, tuple(_rows(lengths)), _note(result))
    figures = (_parts_figure(result),) if lengths[0].parts_ms is not None else ()
    return Report(
        f"Decode latency of {options.model}", (sheet,), (*figures, _latency_figure(result)), notes=_notes(result)
    )


def _rows(lengths: Sequence[LatencyAt]) -> Iterator[tuple[str, ...]]:
    for server in lengths[0].step_ms:
        spreads = [at.step_ms[server] for at in lengths]
        yield (f"step, {server}", *(f"{one.median:.2f}" for one in spreads))
        yield ("  lowest to highest round", *(f"{one.low:.2f} to {one.high:.2f}" for one in spreads))
        parts = [at.parts_ms for at in lengths if at.parts_ms is not None] if server == "ep" else []
        for name in parts[0] if parts else ():
            yield (f"  {name}", *(f"{of[name]:.2f}" for of in parts))
    ratios = [at.ratio for at in lengths if at.ratio is not None]
    if ratios:
        yield ("ep / native", *(f"{ratio.median:.2f}" for ratio in ratios))


def _note(result: DecodeLatency) -> str:
    profiles = [at.profile.period_ms / at.step_ms["ep"].median for at in result.lengths if at.profile is not None]
    if not profiles:
        return ""
    return (
        "The parts are shares of a profiled step, times the step's time without the profiler, with which it took "
        f"{min(profiles):.2f} to {max(profiles):.2f} times as long."
    )


def _notes(result: DecodeLatency) -> tuple[str, ...]:
    parts = result.lengths[0].parts_ms
    if parts is None:
        return ()
    if IDLE in parts:
        return (
            "Kernels of the router's stream. dispatch: choosing slots, and writing rows into the shards' inboxes. "
            "experts here: of slots in the router's process. experts elsewhere: waiting for other shards. attention: "
            "with writing the KV cache. products: matrix products outside of the experts. idle: nothing ran there.",
        )
    return (
        "attention: vLLM's attention op, which reads the KV cache, and the write to it; the projections around it are "
        "in the rest of the model. gate: the gate's product and the choice of experts. dispatch: assigning and "
        "sending. experts: as far as the router waited while a shard computed. combine: the rest of the wait and the "
        "sum. rest of the model: projections, norms, dense layers, shared experts, preparing the step. between steps: "
        "sampling, scheduler, API server.",
    )


def _parts_figure(result: DecodeLatency) -> Figure:
    places = tuple(at.input_len for at in result.lengths)
    parts = [at.parts_ms for at in result.lengths if at.parts_ms is not None]
    series = [Series(name, places, tuple(of[name] for of in parts)) for name in parts[0]]
    title = f"A decode step of {result.batch_size} requests"
    return Figure("parts", title, "input length, tokens", "ms", tuple(series), "stack")


def _latency_figure(result: DecodeLatency) -> Figure:
    places = tuple(at.input_len for at in result.lengths)
    series = []
    for server in result.lengths[0].step_ms:
        spreads = [at.step_ms[server] for at in result.lengths]
        values = tuple(one.median for one in spreads)
        low, high = tuple(one.low for one in spreads), tuple(one.high for one in spreads)
        series.append(Series(server, places, values, low, high))
    title = "Decode latency, with the rounds' range"
    return Figure("latency", title, "input length, tokens", "ms", tuple(series), log_x=True)
