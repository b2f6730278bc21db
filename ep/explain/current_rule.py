"""Graphs and prefill in vLLM 0.32 (engine V1) on a GPU.

A copy of vllm/config/vllm.py `_set_cudagraph_sizes`, vllm/v1/cudagraph_dispatcher.py, vllm/engine/arg_utils.py
`get_batch_defaults` and the scheduler's order of work; tests/serving/test_explain.py compares it with vLLM's own code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ep.explain.steps import Batch, ChunkedPrefill, Rule, Step, count_tokens, padded_size

VERSION = "0.32"
LARGEST_GRAPH = 512
GIB = 1 << 30


OF_EP = (
    "`ep serve` on GPUs captures whole steps where all shards are on the router's host; with shards on other hosts, or "
    "with --transport socket: piecewise in place of full, as graphs end before every MoE layer's dispatch and combine"
)
"""What ep/engine/server.py makes of the rule."""


@dataclass(frozen=True)
class BatchDefaults:
    """What the OpenAI server's engine takes where nothing is given."""

    max_num_batched_tokens: int
    max_num_seqs: int


@dataclass(frozen=True)
class Scheduled:
    """count equal steps: decode_tokens, one a request, beside prefill_tokens."""

    decode_tokens: int
    prefill_tokens: int
    count: int = 1


def current_rule(batch: Batch, max_model_len: int, memory_bytes: float, max_running: int) -> Rule:
    """memory_bytes: of the device. max_running: requests of the batch's length that the KV cache holds at once."""
    defaults = batch_defaults(memory_bytes, max_model_len)
    sizes = capture_sizes(defaults)
    running = max(1, min(batch.num_requests, defaults.max_num_seqs, max_running))
    budget = defaults.max_num_batched_tokens
    notes = [OF_EP]
    if running < batch.num_requests:
        notes.append(f"{batch.num_requests - running} of {batch.num_requests} requests wait: {running} run at once")
    return Rule(
        engine=f"V1 (vLLM {VERSION})",
        chunked_prefill=ChunkedPrefill(
            enabled=True,
            why=f"on by default for every model that generates; {budget:,} tokens a step on a device of "
            f"{memory_bytes / GIB:.0f} GiB",
            budget=budget,
            chunks=-(-batch.input_len // budget),
        ),
        capture_sizes=sizes,
        conditions=(
            "FULL_AND_PIECEWISE: full graphs for decode only, piecewise (all but attention) for any step",
            "enforce_eager off",
            f"tokens of the step within the captured sizes: at most {sizes[-1]}; sequence length does not matter",
            f"decode of up to {min(defaults.max_num_seqs, sizes[-1])} requests at once",
        ),
        max_num_seqs=defaults.max_num_seqs,
        running=running,
        steps=tuple(_steps(Batch(running, batch.input_len, batch.output_len), defaults, sizes)),
        notes=tuple(notes),
    )


def batch_defaults(memory_bytes: float, max_model_len: int) -> BatchDefaults:
    """For a GPU that is no A100, in the OpenAI server."""
    if memory_bytes >= 160 * GIB:
        tokens, seqs = 16384, 1024
    elif memory_bytes >= 70 * GIB:
        tokens, seqs = 8192, 1024
    else:
        tokens, seqs = 2048, 256
    tokens = min(tokens, seqs * max_model_len)
    return BatchDefaults(tokens, min(seqs, tokens))


def capture_sizes(defaults: BatchDefaults) -> tuple[int, ...]:
    """Of the graphs, in tokens of a step: 1, 2, 4, then every 8 to 256, then every 16; no speculative decoding."""
    largest = min(defaults.max_num_seqs * 2, LARGEST_GRAPH, defaults.max_num_batched_tokens)
    sizes = {size for size in (1, 2, 4) if size <= largest}
    sizes |= {*range(8, min(largest + 1, 256), 8), *range(256, largest + 1, 16)}
    if defaults.max_num_batched_tokens <= largest:
        sizes.add(defaults.max_num_batched_tokens)
    if defaults.max_num_seqs <= min(defaults.max_num_seqs * 2, LARGEST_GRAPH):
        sizes |= {size for size in (defaults.max_num_seqs,) if size <= defaults.max_num_batched_tokens}
    return tuple(sorted(sizes))


def dispatch(num_tokens: int, decode_only: bool, sizes: tuple[int, ...], max_num_seqs: int) -> tuple[str, int | None]:
    """("full" | "piecewise" | "eager", size of the graph)."""
    padded = padded_size(num_tokens, sizes)
    if padded is None:
        return "eager", None
    return ("full" if decode_only and padded <= max_num_seqs else "piecewise"), padded


def schedule(batch: Batch, budget: int) -> Iterator[Scheduled]:
    """The steps of a batch that fits at once: running requests first, then as much of the waiting ones as the budget
    holds. Equal steps come together where they follow each other while only decoding."""
    assert batch.num_requests <= budget
    waiting, left_of_one, decoding = batch.num_requests, 0, 0
    ends: deque[tuple[int, int]] = deque()  # (first step without them, requests), in order
    step_idx = 0
    while waiting or left_of_one or ends:
        while ends and ends[0][0] == step_idx:
            decoding -= ends.popleft()[1]
        if not (waiting or left_of_one):
            if ends:
                yield Scheduled(decoding, 0, ends[0][0] - step_idx)
                step_idx = ends[0][0]
            continue
        free, finished = budget - decoding, 0
        if left_of_one:
            taken = min(left_of_one, free)
            left_of_one, free = left_of_one - taken, free - taken
            finished = int(not left_of_one)
        whole = min(waiting, free // batch.input_len)
        waiting, free, finished = waiting - whole, free - whole * batch.input_len, finished + whole
        if waiting and free:
            waiting, left_of_one, free = waiting - 1, batch.input_len - free, 0
        yield Scheduled(decoding, budget - decoding - free)
        step_idx += 1
        if finished and batch.output_len > 1:
            decoding += finished
            ends.append((step_idx + batch.output_len - 1, finished))


def _steps(batch: Batch, defaults: BatchDefaults, sizes: tuple[int, ...]) -> Iterator[Step]:
    scheduled = list(schedule(batch, defaults.max_num_batched_tokens))
    for with_decode in (False, True):
        for mode in ("eager", "piecewise"):
            found = [
                (step, padded)
                for step in scheduled
                for graph, padded in [
                    dispatch(step.decode_tokens + step.prefill_tokens, False, sizes, defaults.max_num_seqs)
                ]
                if step.prefill_tokens and graph == mode and (step.decode_tokens > 0) == with_decode
            ]
            if found:
                yield _prefill_step(found, with_decode, mode, sizes)
    decodes = [step for step in scheduled if not step.prefill_tokens]
    largest = max((step.decode_tokens for step in decodes), default=0)
    groups: dict[tuple[bool, str], list[tuple[Scheduled, int | None]]] = {}
    for step in decodes:
        graph, padded = dispatch(step.decode_tokens, True, sizes, defaults.max_num_seqs)
        groups.setdefault((step.decode_tokens < largest, graph), []).append((step, padded))
    for (_, graph), found in sorted(groups.items()):
        yield _decode_step(found, graph, batch, sizes)


def _prefill_step(
    found: list[tuple[Scheduled, int | None]], with_decode: bool, mode: str, sizes: tuple[int, ...]
) -> Step:
    tokens = [step.decode_tokens + step.prefill_tokens for step, _ in found]
    eager = mode == "eager"
    return Step(
        phase="mixed" if with_decode else "prefill",
        count=len(found),
        tokens=(min(tokens), max(tokens)),
        detail=count_tokens(max(tokens)) + (", decode among them" if with_decode else ""),
        captured=not eager,
        graph=mode,
        why=f"{max(tokens):,} > {sizes[-1]} tokens" if eager else f"{max(tokens):,} <= {sizes[-1]} tokens",
        padded=found[0][1],
    )


def _decode_step(
    found: list[tuple[Scheduled, int | None]], graph: str, batch: Batch, sizes: tuple[int, ...]
) -> Step:
    """All requests, or what is left of them while they end one after the other."""
    tokens = [step.decode_tokens for step, _ in found]
    padded = found[0][1] if len(set(tokens)) == 1 else None
    detail = count_tokens(tokens[0]) if len(set(tokens)) == 1 else f"{max(tokens):,} tokens and fewer, as requests end"
    return Step(
        phase="decode",
        count=sum(step.count for step, _ in found),
        tokens=(min(tokens), max(tokens)),
        detail=detail + (f" padded to {padded}" if padded is not None else ""),
        captured=graph != "eager",
        graph=graph,
        why=f"{max(tokens):,} {'>' if graph == 'eager' else '<='} {sizes[-1]} tokens, any length",
        positions=(batch.input_len + 1, batch.total_len - 1),
        padded=padded,
    )
