"""`ep tune`: the best tile for each shape and number of tokens, measured on this machine's GPUs.

Each (slots, tokens) is one task: every candidate that can work is timed as the whole op in a captured graph, under
even and drawn routing. Results are appended to a journal as they come, so an interrupted run goes on where it
stopped; several GPUs take tasks in parallel through Ray. At the end the files are written, unless what they hold was
measured to be better.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ep import __version__
from ep.bench.moe_case import ROUTINGS, MoeCase, first_slots, random_weights, time_in_graph
from ep.errors import ClusterError, OptionError
from ep.kernels.devices import Device, current_device
from ep.kernels.fused_moe import ExpertShape, ExpertWeights, supports
from ep.kernels.resources import compile_for_amd
from ep.kernels.tuning import TileConfig, default_config, default_tile, file_name, provenance_path, read_provenance
from ep.model import ModelSpec
from ep.presets import load_preset

SLOTS = (4, 8, 9, 16, 18, 32, 33, 36, 64, 128, 256)
"""Of 256 experts on 1 to 64 shards, and with redundant ones."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
ROUNDS = 3
NOISE = 0.01
"""A tile must beat what a file holds by this much to replace it."""


@dataclass(frozen=True)
class TuneOptions:
    """model: a preset's name or a directory with a config.json. shards: tune for the experts of one of so many shards;
    empty: all of SLOTS. folder: where files go (VLLM_TUNED_CONFIG_FOLDER can name it later)."""

    model: str
    shards: tuple[int, ...] = ()
    tokens: tuple[int, ...] = TOKENS
    folder: str = "tuned"


@dataclass(frozen=True)
class Measured:
    """One task's result. us and default_us: means over the routings, of the best tile and of the rule's."""

    slots: int
    tokens: int
    config: TileConfig
    us: float
    default_us: float
    candidates: int


def run(options: TuneOptions) -> list[Measured]:
    """Measures what the journal lacks, writes the files, prints a table. Raises OptionError, ClusterError."""
    path = Path(options.model)
    spec = ModelSpec.from_path(path) if (path / "config.json").is_file() else load_preset(options.model).spec
    if not torch.cuda.is_available():
        raise OptionError("ep tune: this machine has no GPU that torch can use, expected one or more")
    device = current_device()
    dtype = torch.bfloat16 if spec.quant_block is None else device.fp8_dtype or torch.float8_e4m3fn
    slots = tuple(sorted({math.ceil(spec.num_experts / shards) for shards in options.shards})) or SLOTS
    largest = ExpertShape(1, max(slots), spec.hidden_size, spec.moe_intermediate_size, dtype)
    supported, reason = supports(largest, device)
    if not supported:
        raise OptionError(f"ep tune: {options.model}: {reason}")
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / f"tune-{device.name}-N={largest.intermediate}.jsonl"
    done = {(result.slots, result.tokens): result for result in read_journal(journal)}
    tasks = [(count, tokens) for count in slots for tokens in options.tokens if (count, tokens) not in done]
    with _progress() as bar:
        task = bar.add_task(f"tuning on {torch.cuda.device_count()} GPU(s)", total=len(tasks))
        for result in _measure_all(tasks, largest):
            append_journal(journal, result)
            done[result.slots, result.tokens] = result
            bar.advance(task)
    results = [done[count, tokens] for count in slots for tokens in options.tokens]
    kept = {count: write_file(folder, largest, device, [r for r in results if r.slots == count]) for count in slots}
    _print(results, kept, device, folder)
    return results


def candidates(rows_per_slot: float, device: Device, quantized: bool) -> list[TileConfig]:
    """Tiles worth timing: row blocks around the rows per slot, what group size and warps change."""
    rule = default_config(rows_per_slot, device, quantized)
    sizes = [size for size in (16, 32, 64, 128) if rule.block_m // 4 <= size <= 2 * rule.block_m]
    found = []
    for block_m in sizes:
        base = default_tile(block_m, device, quantized)
        for group_m in (1,) if rows_per_slot <= 4 else (1, 4, 16):
            for warps in (base.num_warps,) if device.is_hopper and quantized else (4, 8):
                for waves in (0, 2) if device.is_amd else (0,):
                    tile = (base.block_m, base.block_n, base.block_k, group_m, warps, base.num_stages, waves)
                    found.append(TileConfig(*tile, base.matrix_instr_nonkdim, base.kpack))
    return found


def append_journal(path: Path, result: Measured) -> None:
    """One line per result, on a line of its own even after a line that a kill cut short."""
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as stream:
        stream.write(("\n" if cut else "") + json.dumps(asdict(result)) + "\n")


def read_journal(path: Path) -> list[Measured]:
    """Results of earlier runs; a line that a kill cut short is left out."""
    results = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        results.append(Measured(**{**entry, "config": TileConfig(**entry["config"])}))
    return results


def write_file(folder: Path, shape: ExpertShape, device: Device, results: list[Measured]) -> set[int]:
    """Writes one shape's file and its provenance. Returns the numbers of tokens whose old entry was better and
    stays."""
    path = folder / file_name(results[0].slots, shape.intermediate, device.name, shape.quantized)
    entries: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.is_file() else {}
    measured: dict[str, dict[str, float]] = read_provenance(path).get("measured_us", {})
    kept = set()
    for result in results:
        key = str(result.tokens)
        if key in entries and measured.get(key, {}).get("best", math.inf) <= result.us * (1 + NOISE):
            kept.add(result.tokens)
            continue
        entries[key] = result.config.to_vllm()
        measured[key] = {"best": round(result.us, 2), "default": round(result.default_us, 2)}
    provenance = {
        "how": "measured: the whole op in a captured graph, mean of even and drawn routing, one slot per token",
        "device": device.name,
        "pci_id": None if device.pci_id is None else f"0x{device.pci_id:04x}",
        "versions": {"ep": __version__, "torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hidden_size": shape.hidden,
        "measured_us": dict(sorted(measured.items(), key=lambda item: int(item[0]))),
    }
    path.write_text(json.dumps(dict(sorted(entries.items(), key=lambda item: int(item[0]))), indent=4) + "\n")
    provenance_path(path).write_text(json.dumps(provenance, indent=2) + "\n")
    return kept


def measure(weights: ExpertWeights, num_tokens: int, device: Device) -> Measured:
    """One task on the current GPU."""
    shape = weights.shape
    cases = [
        MoeCase.make(weights, num_tokens, r, seed) for r in ROUTINGS for seed in range(2 if num_tokens < 64 else 1)
    ]
    rows = num_tokens / shape.num_slots
    rule = default_config(rows, device, shape.quantized)
    tried = dict.fromkeys([rule, *candidates(rows, device, shape.quantized)])
    usable = [config for config in tried if config == rule or _cannot_work(config, shape, device) is None]
    times: dict[TileConfig, list[float]] = {config: [] for config in usable}
    # In turns, because the clock that a GPU holds changes with its temperature.
    for _ in range(ROUNDS):
        for config, taken in times.items():
            taken.append(time_in_graph([partial(case.run, config, device) for case in cases]))
    us = {config: statistics.median(taken) for config, taken in times.items()}
    best = min(us, key=us.__getitem__)
    return Measured(shape.num_slots, num_tokens, best, us[best], us[rule], len(us))


def _cannot_work(config: TileConfig, shape: ExpertShape, device: Device) -> str | None:
    """Why a tile need not be timed. On NVIDIA the launch plan fits every tile to the shared memory there is."""
    if not device.is_amd:
        return None
    for swiglu in (True, False):
        used = compile_for_amd(config, device.arch, shape.dtype, shape.hidden, shape.intermediate, swiglu=swiglu)
        problem = used.problem(device.shared_bytes, shape.quantized)
        if problem is not None:
            return problem
    return None


def _measure_all(tasks: list[tuple[int, int]], largest: ExpertShape) -> Iterator[Measured]:
    """Results in the order in which they come."""
    if torch.cuda.device_count() > 1 and len(tasks) > 1:
        yield from _measure_in_parallel(tasks, largest)
    elif tasks:
        weights = random_weights(largest)
        for num_slots, num_tokens in tasks:
            yield measure(first_slots(weights, num_slots), num_tokens, current_device())


def _measure_in_parallel(tasks: list[tuple[int, int]], largest: ExpertShape) -> Iterator[Measured]:
    """One Ray actor per GPU; each takes the next task when it has answered."""
    import ray

    from ep.cluster.task_pool import run_tasks

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        remote: Any = ray.remote(num_gpus=1)(_Tuner)
        yield from run_tasks([remote.remote(largest) for _ in range(torch.cuda.device_count())], tasks)
    except ClusterError as error:
        raise ClusterError(f"ep tune: {error}; what was measured is kept, run it again to go on") from error
    finally:
        if started_here:
            ray.shutdown()


class _Tuner:
    """Measures on the GPU that Ray gave to its process."""

    def __init__(self, shape: ExpertShape) -> None:
        self._weights = random_weights(shape)

    def run(self, num_slots: int, num_tokens: int) -> Measured:
        return measure(first_slots(self._weights, num_slots), num_tokens, current_device())


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _print(results: list[Measured], kept: dict[int, set[int]], device: Device, folder: Path) -> None:
    table = Table(title=f"{device.name}: tiles written to {folder}")
    for heading in ("slots", "tokens", "rule µs", "tuned µs", "gain", "tile", ""):
        table.add_column(heading, justify="left" if heading in ("tile", "") else "right")
    for result in results:
        config = result.config
        table.add_row(
            str(result.slots), str(result.tokens), f"{result.default_us:.1f}", f"{result.us:.1f}",
            f"{result.default_us / result.us - 1:.1%}",
            f"{config.block_m}x{config.block_n}x{config.block_k} group {config.group_m}, {config.num_warps} warps",
            "kept what the file had" if result.tokens in kept[result.slots] else "",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"device": asdict(device), "results": [asdict(result) for result in results]}))
