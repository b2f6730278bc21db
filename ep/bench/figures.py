"""The figures of a benchmark's JSON, under names that two results of one benchmark share. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ep.bench.sweep import Point
from ep.errors import OptionError

HIGHER, LOWER, BASELINE = "higher", "lower", "baseline"


@dataclass(frozen=True)
class Figure:
    """rounds: its value in each of them, where there are any. better: HIGHER or LOWER; BASELINE for what is not ours,
    and says only how the machine has changed."""

    name: str
    value: float
    better: str
    rounds: tuple[float, ...] = ()


def figures(result: Mapping[str, Any], source: str) -> list[Figure]:
    """In the result's order. source: what errors call it. Raises OptionError for what `ep bench` has not written."""
    read = _READERS.get(str(result.get("bench")))
    if read is None:
        raise OptionError(f"{source}: bench is {result.get('bench')!r}, expected one of {', '.join(sorted(_READERS))}")
    try:
        found = list(read(result))
        assert all(isinstance(value, int | float) and value >= 0 for one in found for value in (one.value, *one.rounds))
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        wrong = f"{type(error).__name__} {error}".strip()
        raise OptionError(f"{source}: is no result of this version's ep bench {result['bench']} ({wrong})") from error
    return found


def _serve(result: Mapping[str, Any]) -> Iterator[Figure]:
    for measured in result["points"]:
        at = Point(**measured["point"]).label
        for server, summary in measured["servers"].items():
            served = [r["served"] for r in measured["rounds"] if r["server"] == server]
            for name, better in _SERVED.items():
                words, value = _words(name), _value(summary["served"], name)
                judged = better if server == "ep" else BASELINE
                yield Figure(f"{at}, {server}: {words}", value, judged, tuple(_value(one, name) for one in served))
        if measured["ratio"]:
            yield Figure(f"{at}: ep / native", measured["ratio"]["median"], HIGHER, _ratios(measured["rounds"]))


_SERVED = {"output_tokens_per_s": HIGHER, "total_tokens_per_s": HIGHER, "requests_per_s": HIGHER} | {
    f"{latency}_ms {p}": LOWER for latency in ("ttft", "tpot", "itl") for p in ("p50", "p90", "p99")
}


def _words(name: str) -> str:
    if " " in name:
        latency, p = name.split()
        return f"{latency.removesuffix('_ms').upper()} {p}, ms"
    return name.removesuffix("_per_s").replace("_", " ") + "/s"


def _value(served: Mapping[str, Any], name: str) -> float:
    first, _, second = name.partition(" ")
    return float(served[first][second] if second else served[first])


def _ratios(rounds: list[dict[str, Any]]) -> tuple[float, ...]:
    speed = {(r["server"], r["round_idx"]): float(r["served"]["output_tokens_per_s"]) for r in rounds}
    return tuple(value / speed["native", idx] for (name, idx), value in speed.items() if name == "ep")


def _decode_latency(result: Mapping[str, Any]) -> Iterator[Figure]:
    for at in result["lengths"]:
        name = f"input {at['input_len']}"
        for server, step in at["step_ms"].items():
            rounds = tuple(r["decoded"]["step_ms"] for r in at["rounds"] if r["server"] == server)
            better = LOWER if server == "ep" else BASELINE
            yield Figure(f"{name}, {server}: step, ms", step["median"], better, rounds)
        for part, value in (at["parts_ms"] or {}).items():
            yield Figure(f"{name}: {part}, ms", value, LOWER)
        if at["ratio"]:
            steps = {(r["server"], r["round_idx"]): r["decoded"]["step_ms"] for r in at["rounds"]}
            ratios = tuple(value / steps["native", idx] for (server, idx), value in steps.items() if server == "ep")
            yield Figure(f"{name}: ep / native", at["ratio"]["median"], LOWER, ratios)


def _nodes(result: Mapping[str, Any]) -> Iterator[Figure]:
    for point in result["points"]:
        name, rounds = f"{point['num_nodes']} nodes, {point['num_shards']} shards", point["rounds"]
        speeds = tuple(r["output_tokens_per_s"] for r in rounds)
        yield Figure(f"{name}: output tokens/s", point["output_tokens_per_s"], HIGHER, speeds)
        yield Figure(f"{name}: efficiency", point["efficiency"], HIGHER)
        yield Figure(f"{name}: failed requests", point["num_failed"], LOWER)
        yield Figure(f"{name}: texts that differ", point["num_different"], LOWER)
        for link in point["links"]:
            for key in ("round_trip_us_p50", "round_trip_us_p99", "bytes_per_token"):
                yield Figure(f"{name}, shard {link['shard']}: {key}", link[key], LOWER)


def _soak(result: Mapping[str, Any]) -> Iterator[Figure]:
    yield Figure("output tokens/s", result["output_tokens_per_s"], HIGHER)
    yield Figure("failed requests", result["num_failed"], LOWER)
    grown = max((1 + one["growth"] for one in result["growths"]), default=1.0)
    yield Figure("memory of the process that grew most, after / before", grown, LOWER)


def _transport(result: Mapping[str, Any]) -> Iterator[Figure]:
    for row in result["round_trips"]:
        better = BASELINE if row["way"] == "gloo" else LOWER
        name = f"{row['load']}, {row['num_shards']} shards, {row['way']}"
        for p in ("p50", "p99"):
            yield Figure(f"{name}: {p}, µs", row[f"{p}_us"], better, tuple(row[f"{p}_us_rounds"]))


def _transport_ipc(result: Mapping[str, Any]) -> Iterator[Figure]:
    for row in result["round_trips"]:
        name = f"{row['arrangement']}, {row['num_shards']} shards, {row['tokens']} tokens"
        yield Figure(f"{name}: a layer, µs", row["us"], LOWER, tuple(row["us_rounds"]))
        yield Figure(f"{name}: launch, µs", row["launch_us"], LOWER)
        if row["nccl_us"] is not None:
            yield Figure(f"{name}: NCCL, µs", row["nccl_us"], BASELINE)
    for row in result["polls"]:
        name = f"{row['arrangement']}, {row['num_shards']} shards, a poll after {row['idle_ms']} ms"
        for p in ("p50", "p99"):
            yield Figure(f"{name}: {p}, µs", row[f"{p}_us"], LOWER)


def _kernels(result: Mapping[str, Any]) -> Iterator[Figure]:
    for row in result["times"]:
        name = f"{row['op']}, {row['tokens']} tokens, {row['routing']}"
        for key, label, better in (
            ("us", "ep", LOWER),
            ("vllm_us", "vLLM", BASELINE),
            ("deep_gemm_us", "DeepGEMM", BASELINE),
        ):
            if row[key] is not None:
                yield Figure(f"{name}: {label}, µs", row[key], better)


def _joining(result: Mapping[str, Any]) -> Iterator[Figure]:
    for row in result["found"]:
        name = f"{row['num_tokens']} tokens, {'stalls' if row['stalls'] else 'no stalls'}"
        if row["waits"]:
            yield Figure(f"{name}: mean step, ms", row["mean_ms"], LOWER)
            yield Figure(f"{name}: joined", row["joined"], HIGHER)
        else:
            yield Figure(f"{name}: mean step without waiting, ms", row["mean_ms"], BASELINE)


def _rebalance(result: Mapping[str, Any]) -> Iterator[Figure]:
    for phase in ("before", "during", "after"):
        of = result[phase]
        yield Figure(f"{phase}: tokens/s", of["tokens_per_s"], HIGHER)
        for key, label in (("gap_p50_ms", "gap p50, ms"), ("gap_p99_ms", "gap p99, ms"), ("gap_max_ms", "longest, ms")):
            yield Figure(f"{phase}: {label}", of[key], LOWER)
        yield Figure(f"{phase}: failed requests", of["num_failed"], LOWER)
    yield Figure("switch, s", result["switch_s"], LOWER)
    yield Figure("longest gap while moving, ms", result["switch_gap_max_ms"], LOWER)
    yield Figure("texts that differ", result["num_different"], LOWER)


def _placement(result: Mapping[str, Any]) -> Iterator[Figure]:
    for row in result["results"]:
        name = f"{row['load']}, {row['num_shards']} shards, {row['num_redundant']} redundant"
        for key in ("excess", "next_excess", "waterfill", "plan_ms", "waterfill_us"):
            yield Figure(f"{name}: {key}", row[key], LOWER)
        for key in ("vllm_excess", "next_vllm_excess", "vllm_plan_ms"):
            if row[key] is not None:
                yield Figure(f"{name}: {key}", row[key], BASELINE)


_READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Figure]]] = {
    "decode-latency": _decode_latency,
    "joining": _joining,
    "kernels": _kernels,
    "nodes": _nodes,
    "placement": _placement,
    "rebalance": _rebalance,
    "serve": _serve,
    "soak": _soak,
    "transport": _transport,
    "transport-ipc": _transport_ipc,
}
