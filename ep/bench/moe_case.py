"""One call of the fused MoE with made-up operands, and how long a call takes inside a captured graph.

Random weights and tokens: zeros run faster than real data do. Weights and activations fill the range of their type, as
quantised ones do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ep.kernels.devices import Device
from ep.kernels.fused_moe import SCALE_BLOCK, ExpertShape, ExpertWeights, Workspace, fused_moe
from ep.kernels.tuning import TileConfig

ROUTINGS = ("even", "drawn")
"""even: every slot gets the same number of rows, within one. drawn: every row's slot is drawn, as a gate's load
varies."""

REPLAYS = 5


@dataclass(frozen=True)
class MoeCase:
    """Operands of one call on the current device: `num_tokens` tokens with one slot each."""

    weights: ExpertWeights
    x: torch.Tensor
    slot_ids: torch.Tensor
    topk_weights: torch.Tensor
    layer_idx: torch.Tensor
    num_tokens: torch.Tensor
    out: torch.Tensor
    workspace: Workspace

    @classmethod
    def make(cls, weights: ExpertWeights, num_tokens: int, routing: str, seed: int = 0) -> MoeCase:
        device = weights.gate_up.device
        generator = torch.Generator(device).manual_seed(seed)
        num_slots = weights.shape.num_slots
        if routing == "even":
            slots = torch.randperm(num_tokens, generator=generator, device=device) % num_slots
        else:
            slots = torch.randint(0, num_slots, (num_tokens,), generator=generator, device=device)
        x = torch.randn(num_tokens, weights.shape.hidden, generator=generator, device=device).bfloat16()
        return cls(
            weights=weights,
            x=x,
            slot_ids=slots.int()[:, None],
            topk_weights=torch.rand(num_tokens, 1, generator=generator, device=device),
            layer_idx=torch.zeros(1, dtype=torch.int32, device=device),
            num_tokens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
            out=torch.empty_like(x),
            workspace=Workspace.allocate(weights, num_tokens, 1),
        )

    def run(self, config: TileConfig, device: Device) -> None:
        fused_moe(
            self.x, self.weights, self.slot_ids, self.topk_weights, layer_idx=self.layer_idx,
            num_tokens=self.num_tokens, out=self.out, workspace=self.workspace, config=config, device=device,
        )  # fmt: skip


def random_weights(shape: ExpertShape, device: torch.device | str = "cuda") -> ExpertWeights:
    """Weights of one layer after another, so that no float32 copy of the whole lies in memory."""

    def matrices(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = (shape.num_layers, shape.num_slots, rows, columns)
        weight = torch.empty(size, dtype=shape.dtype, device=device)
        if not shape.quantized:
            return weight.normal_(std=columns**-0.5), None
        limit = torch.finfo(shape.dtype).max
        for matrix in weight.view(-1, rows, columns):
            matrix.copy_((torch.randn(rows, columns, device=device) * (limit / 7)).clamp_(-limit, limit))
        scales = torch.rand(*size[:2], rows // SCALE_BLOCK, columns // SCALE_BLOCK, device=device)
        return weight, (0.5 + scales) * (7 / limit * columns**-0.5)

    gate_up, gate_up_scale_inv = matrices(2 * shape.intermediate, shape.hidden)
    down, down_scale_inv = matrices(shape.hidden, shape.intermediate)
    return ExpertWeights(gate_up, down, gate_up_scale_inv, down_scale_inv)


def first_slots(weights: ExpertWeights, num_slots: int) -> ExpertWeights:
    """The first slots of one layer's weights, without a copy."""

    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[:, :num_slots]

    gate_up, down = weights.gate_up[:, :num_slots], weights.down[:, :num_slots]
    assert gate_up.is_contiguous(), "several layers cannot be cut without a copy"
    return ExpertWeights(gate_up, down, cut(weights.gate_up_scale_inv), cut(weights.down_scale_inv))


def time_in_graph(calls: list[Callable[[], object]], aim_us: float = 4000.0) -> float:
    """Microseconds of one call: the calls in turn, captured in one graph; median of its replays after a warm-up.

    Several calls on different operands keep a small case's weights from staying in the L2 from one replay to the next.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = max(1, min(8, round(aim_us / max(start.elapsed_time(end) * 1e3, 1.0))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)
