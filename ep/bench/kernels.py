"""`ep bench kernels`: the ops of a shard on this GPU, beside vLLM's kernel and DeepGEMM where they are installed.

Everything is timed inside captured graphs, the baselines in the same run and in turns with ours, and set against
what the device can do: bytes and operations that no kernel can save, over ceilings measured in this run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ep.bench.conditions import Conditions, conditions
from ep.bench.kernel_baselines import Call, deep_gemm, vllm_fused_moe
from ep.bench.moe_case import ROUTINGS, MoeCase, random_weights, time_in_graph
from ep.bench.page import Report
from ep.bench.plot import Figure, Series
from ep.bench.result import publish
from ep.errors import OptionError
from ep.kernels import gating, quant, slots
from ep.kernels.devices import Device, current_device
from ep.kernels.fused_moe import ExpertShape, choose_config, supports
from ep.kernels.roofline import Ceilings, Work, assign_work, fused_moe_work, gating_work, quantize_work
from ep.model import ModelSpec
from ep.presets import load_preset
from ep.sheet import Sheet
from ep.terminal import Terminal

TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384)
ROTATE = 4
"""Cases in turn below 64 tokens, so that a few slots' weights do not stay in the L2."""


@dataclass(frozen=True)
class KernelBenchOptions:
    """model: a preset's name or a directory with a config.json. slots: expert slots of the shard. tokens: rows that
    reach it, one slot each. baselines: also vLLM and DeepGEMM, where installed."""

    model: str = "deepseek-v3"
    slots: int = 32
    tokens: tuple[int, ...] = TOKENS
    baselines: bool = True
    output: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class KernelTime:
    """One op at one size. us: ours; None where a baseline is not there. floor_us: the roofline, by this run's
    ceilings."""

    op: str
    tokens: int
    routing: str
    us: float
    vllm_us: float | None
    deep_gemm_us: float | None
    floor_us: float
    tflops: float
    config: str


@dataclass(frozen=True)
class KernelBench:
    options: KernelBenchOptions
    conditions: Conditions
    device: Device
    ceilings: Ceilings
    times: tuple[KernelTime, ...]


def run(options: KernelBenchOptions) -> KernelBench:
    """Measures, prints a table and one JSON line. Raises OptionError without a GPU or for a shape no kernel
    supports."""
    spec = _spec(options.model)
    if not torch.cuda.is_available():
        raise OptionError("ep bench kernels: this machine has no GPU that torch can use, expected one")
    device = current_device()
    dtype = torch.bfloat16 if spec.quant_block is None else device.fp8_dtype or torch.float8_e4m3fn
    shape = ExpertShape(1, options.slots, spec.hidden_size, spec.moe_intermediate_size, dtype)
    supported, reason = supports(shape, device)
    if not supported:
        raise OptionError(f"ep bench kernels: {options.model}: {reason}")
    ceilings = measure_ceilings()
    weights = random_weights(shape)
    times = []
    terminal = Terminal()
    with terminal.progress("measuring", len(options.tokens) * (len(ROUTINGS) + 3)) as (bar, task):
        for num_tokens in options.tokens:
            for routing in ROUTINGS:
                seeds = range(ROTATE if num_tokens < 64 else 1)
                cases = [MoeCase.make(weights, num_tokens, routing, seed) for seed in seeds]
                times.append(_time_moe(cases, num_tokens, routing, device, ceilings, options))
                bar.advance(task)
            times.append(_time_gating(num_tokens, spec, ceilings))
            bar.advance(task)
            times.append(_time_assign(num_tokens, spec, ceilings))
            bar.advance(task)
            times.append(_time_quantize(num_tokens, shape, device, ceilings))
            bar.advance(task)
    bench = KernelBench(options, conditions(), device, ceilings, tuple(times))
    console = Console()
    # A file has no width of its own, and a cut table is of no use in it.
    publish("kernels", bench, describe(bench), console if console.is_terminal else Console(width=150))
    return bench


def measure_ceilings() -> Ceilings:
    """This device, now: cuBLAS (hipBLASLt) on 8192 x 8192 x 8192 and the sum of 4 GiB, which only reads."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    bf16_us = time_in_graph([lambda: a @ b])
    dtype = current_device().fp8_dtype
    fp8_us = bf16_us
    if dtype is not None:
        x, w = a.to(dtype), b.to(dtype)
        one = torch.ones((), device="cuda")
        fp8_us = time_in_graph([lambda: torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16)])
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    read_us = time_in_graph([lambda: data.sum()])
    flops = 2 * size**3 * 1e6
    return Ceilings(flops / fp8_us, flops / bf16_us, data.nbytes / read_us * 1e6)


def _spec(model: str) -> ModelSpec:
    path = Path(model)
    return ModelSpec.from_path(path) if (path / "config.json").is_file() else load_preset(model).spec


def _time_moe(
    cases: list[MoeCase], num_tokens: int, routing: str, device: Device, ceilings: Ceilings, options: KernelBenchOptions
) -> KernelTime:
    shape = cases[0].weights.shape
    config = choose_config(shape, num_tokens, device)
    us = time_in_graph([partial(case.run, config, device) for case in cases])
    others = {
        name: _time_baseline(name, make, cases) if options.baselines else None
        for name, make in (("vLLM", vllm_fused_moe), ("DeepGEMM", deep_gemm))
    }
    used = round(sum(len(case.slot_ids.unique()) for case in cases) / len(cases))
    work = fused_moe_work(shape, num_tokens, used, num_tokens)
    return KernelTime(
        "fused_moe", num_tokens, routing, us, others["vLLM"], others["DeepGEMM"],
        ceilings.floor_us(work, shape.quantized), work.flops / us * 1e-6,
        f"{config.block_m}x{config.block_n}x{config.block_k} group {config.group_m}",
    )  # fmt: skip


def _time_baseline(name: str, make: Callable[[MoeCase], Call | None], cases: list[MoeCase]) -> float | None:
    """Microseconds; None where it is not installed, or fails for a reason of its own, which is printed."""
    try:
        calls = [call for case in cases if (call := make(case)) is not None]
        return time_in_graph(calls) if calls else None
    except Exception as error:
        print(f"{name}: left out: {type(error).__name__}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return None


def _time_gating(num_tokens: int, spec: ModelSpec, ceilings: Ceilings) -> KernelTime:
    logits = torch.randn(num_tokens, spec.num_experts, device="cuda")
    bias = torch.randn(spec.num_experts, device="cuda") if spec.scoring == "sigmoid" else None
    us = time_in_graph([lambda: gating.route(logits, bias, spec)])
    return _small("gating", num_tokens, us, gating_work(num_tokens, spec.num_experts, spec.top_k), ceilings)


def _time_assign(num_tokens: int, spec: ModelSpec, ceilings: Ceilings) -> KernelTime:
    ids = torch.randint(0, spec.num_experts, (num_tokens, spec.top_k), dtype=torch.int32, device="cuda")
    slot_of = torch.arange(spec.num_experts, dtype=torch.int32, device="cuda")[None]
    sizes = torch.tensor([num_tokens, num_tokens], dtype=torch.int32, device="cuda")
    load = torch.zeros(2, 1, spec.num_experts, dtype=torch.int64, device="cuda")
    us = time_in_graph([lambda: slots.assign_slots(ids, slot_of, sizes, load, 0)])
    return _small("slots", num_tokens, us, assign_work(num_tokens, spec.top_k), ceilings)


def _time_quantize(num_tokens: int, shape: ExpertShape, device: Device, ceilings: Ceilings) -> KernelTime:
    x = torch.randn(num_tokens, shape.hidden, device="cuda").bfloat16()
    dtype = device.fp8_dtype or torch.float8_e4m3fn
    out = quant.quantize_tokens(x, dtype)
    us = time_in_graph([lambda: quant.quantize_tokens(x, dtype, out)])
    return _small("quantize", num_tokens, us, quantize_work(num_tokens, shape.hidden), ceilings)


def _small(op: str, num_tokens: int, us: float, work: Work, ceilings: Ceilings) -> KernelTime:
    return KernelTime(op, num_tokens, "-", us, None, None, ceilings.floor_us(work), 0.0, "-")


def describe(bench: KernelBench) -> Report:
    """The table, and a plot of the fused MoE of even routing beside its baselines."""
    ceilings = bench.ceilings
    columns = ("op", "tokens", "routing", "µs", "vLLM µs", "DeepGEMM µs", "floor µs", "of floor", "TFLOP/s", "tile")
    rows = tuple(
        (
            time.op,
            str(time.tokens),
            time.routing,
            *(
                "-" if cell is None else f"{cell:.1f}"
                for cell in (time.us, time.vllm_us, time.deep_gemm_us, time.floor_us)
            ),
            f"{time.floor_us / time.us:.0%}",
            f"{time.tflops:.0f}" if time.tflops else "-",
            time.config,
        )
        for time in bench.times
    )
    title = (
        f"{bench.device.name}: {bench.options.model}, {bench.options.slots} slots; reading "
        f"{ceilings.read_bytes / 1e12:.2f} TB/s, FP8 {ceilings.fp8_flops / 1e12:.0f} TFLOP/s"
    )
    moe = [time for time in bench.times if (time.op, time.routing) == ("fused_moe", ROUTINGS[0])]
    series = []
    for label, of in (("ep", "us"), ("vLLM", "vllm_us"), ("DeepGEMM", "deep_gemm_us"), ("floor", "floor_us")):
        points = [(time.tokens, getattr(time, of)) for time in moe if getattr(time, of) is not None]
        x, y = tuple(x for x, _ in points), tuple(y for _, y in points)
        series += [Series(label, x, y, dashed=label == "floor")] if points else []
    figure = Figure("fused-moe", f"Fused MoE, {ROUTINGS[0]} routing", "tokens", "µs", tuple(series), log_x=True)
    return Report(f"Kernels on {bench.device.name}", (Sheet(title, columns, rows),), (figure,))
