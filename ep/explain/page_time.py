"""Expected times and tuned files as rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ep.explain.explanation import Explanation
from ep.explain.figure import Kind
from ep.explain.step_time import StepTime
from ep.explain.tuned import TunedFile
from ep.explain.words import ids, micros

KIND_MARKS: dict[Kind, str] = {"measured": "[m]", "published": "[p]", "estimated": "[e]"}


def time_rows(step: StepTime) -> list[tuple[str, ...]]:
    """part, of a layer, layers, of the step, kind."""
    rows: list[tuple[str, ...]] = []
    for part in step.parts:
        beside = " (beside the round trip)" if part.overlapped else ""
        rows.append(
            (
                part.name + beside,
                micros(part.us.value),
                str(part.layers),
                micros(part.step_us),
                KIND_MARKS[part.us.kind],
            )
        )
    return rows


def link_lines(explanation: Explanation) -> Iterator[str]:
    """Where the figures come from, each with its mark."""
    hardware, layout, trip = explanation.hardware, explanation.layout, explanation.round_trip
    for label, figure, unit in (
        ("reading memory", hardware.read_bytes_per_s, "TB/s"),
        ("FP8 products", hardware.fp8_flops, "TFLOP/s"),
        ("bf16 products", hardware.bf16_flops, "TFLOP/s"),
    ):
        yield f"{KIND_MARKS[figure.kind]} {label} {figure.value / 1e12:,.4g} {unit}: {figure.source}"
    links = [("round trip on a node", hardware.same_node)]
    if layout.nodes > 1:
        links.append(("round trip between nodes", hardware.between_nodes))
    for label, known in links:
        us, rate = known.us, known.bytes_per_s
        yield f"{KIND_MARKS[us.kind]} {label} {us.value:g} µs for {known.num_tokens} tokens: {us.source}"
        yield f"{KIND_MARKS[rate.kind]} and at {rate.value / 1e9:g} GB/s: {rate.source}"
    yield f"{KIND_MARKS[trip.transfer.kind]} dispatch and combine in decode, {trip.transfer.source}"
    yield f"{KIND_MARKS[trip.experts.kind]} experts in decode, {trip.experts.source}"


def tuned_rows(files: Sequence[TunedFile]) -> list[tuple[str, ...]]:
    """Names that end in the same files share a row: what the host reports, ep's answer, vLLM's."""
    groups: dict[tuple[object, ...], list[TunedFile]] = {}
    for row in files:
        groups.setdefault((row.pci_id is None, row.resolved, row.file, row.vllm_file), []).append(row)
    num_names = len({row.reported for row in files})
    rows: list[tuple[str, ...]] = []
    for found in groups.values():
        names = list(dict.fromkeys(row.reported for row in found))
        known = list(dict.fromkeys(row.pci_id for row in found))
        reported = "any of the names" if len(names) == num_names > 1 else "\n".join(names)
        rows.append((f"{reported}\nPCI id {ids(known)}", _ours(found[0]), _theirs(found[0])))
    return rows


def _ours(row: TunedFile) -> str:
    if row.file == "rule":
        return f"{row.resolved}\n{row.reason}: by rule"
    how = f", {row.how}" if row.how else ""
    return f"{row.resolved}\n{_sizes(row.file)} of {row.folder}\n({row.reason.partition(':')[0]}{how})"


def _theirs(row: TunedFile) -> str:
    if row.vllm_found is None:
        return "vLLM is not installed"
    name = row.vllm_file.partition("device_name=")[2].removesuffix(".json").partition(",")[0]
    return f"{name}\n{_sizes(row.vllm_file)}\n" + ("found" if row.vllm_found else "Config file not found")


def _sizes(file: str) -> str:
    return file.partition(",device_name=")[0]
