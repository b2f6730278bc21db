"""Graphs and prefill in vLLM's older engine (V0, vLLM 0.8 to 0.10): the rule that logs and guides of that time show.

From `_use_captured_graph` and `_get_graph_batch_size` of vllm/worker/model_runner.py, `_set_default_args_v0` of
vllm/engine/arg_utils.py and `SchedulerConfig.__post_init__` of vllm/config.py.
"""

from __future__ import annotations

from ep.explain.steps import Batch, ChunkedPrefill, Rule, Step, count_tokens, padded_size

MAX_NUM_SEQS = 256
CAPTURED_LEN = 8192
"""--max-seq-len-to-capture unless it is given."""
LONG_CONTEXT = 32768
CHUNK = 2048
CAPTURE_SIZES = (1, 2, 4, *range(8, MAX_NUM_SEQS + 1, 8))


def older_rule(
    batch: Batch, max_model_len: int, mla: bool, amd: bool, max_running: int, captured_len: int | None = None
) -> Rule:
    """max_running: requests of the batch's length that the KV cache holds at once. captured_len:
    --max-seq-len-to-capture; None is as long as the batch's sequences get, as guides set it."""
    asked = batch.total_len if captured_len is None else captured_len
    longest = min(asked, max_model_len)
    running = max(1, min(batch.num_requests, MAX_NUM_SEQS, max_running))
    chunked = _chunked_prefill(batch, max_model_len, mla, amd)
    steps = [_prefill(batch, running, chunked), *_decode(batch, running, longest)]
    captured_how = "--max-seq-len-to-capture" if captured_len is not None else "input + output"
    notes = []
    if captured_len is None and batch.total_len > CAPTURED_LEN:
        beyond = max(CAPTURED_LEN, batch.input_len)
        notes.append(
            f"--max-seq-len-to-capture left at its default of {CAPTURED_LEN:,}: decode runs eager beyond {beyond:,}"
        )
    if chunked.enabled:
        whole = _prompts_at_once(batch, running, max(max_model_len, CHUNK))
        notes.append(
            f"chunked prefill turned off: prefill of {batch.input_len:,} x {whole} tokens a step, not captured either"
        )
    if running < batch.num_requests:
        notes.append(f"{batch.num_requests - running} of {batch.num_requests} requests wait: {running} run at once")
    return Rule(
        engine="V0 (vLLM 0.8 to 0.10)",
        chunked_prefill=chunked,
        capture_sizes=CAPTURE_SIZES,
        conditions=(
            "decode only: no prefill token in the step",
            "enforce_eager off",
            f"batch within the captured sizes: at most {CAPTURE_SIZES[-1]}",
            f"sequence within the captured length: at most {longest:,} ({captured_how})",
        ),
        max_num_seqs=MAX_NUM_SEQS,
        running=running,
        steps=tuple(steps),
        max_captured_len=longest,
        notes=tuple(notes),
    )


def _chunked_prefill(batch: Batch, max_model_len: int, mla: bool, amd: bool) -> ChunkedPrefill:
    long = max_model_len > LONG_CONTEXT
    compared = f"max_model_len {max_model_len:,} {'>' if long else '<='} {LONG_CONTEXT:,}"
    if mla:
        enabled, why = False, "off: not supported with MLA"
    elif not long:
        enabled, why = False, f"off by default: {compared}"
    elif amd:
        enabled, why = False, f"on by default above 32k, as here ({compared}), but on CUDA only: off on ROCm since 0.8"
    else:
        enabled, why = True, f"on by default: {compared}"
    budget = CHUNK if enabled else max(max_model_len, CHUNK)
    return ChunkedPrefill(enabled, why, budget, -(-batch.input_len // budget), by_length=long)


def _prompts_at_once(batch: Batch, running: int, budget: int) -> int:
    return max(1, min(running, budget // batch.input_len))


def _prefill(batch: Batch, running: int, chunked: ChunkedPrefill) -> Step:
    why = "prefill: not decode only"
    total = running * batch.input_len
    if chunked.enabled:
        count = -(-total // chunked.budget)
        most = min(chunked.budget, total)
        least = total - (count - 1) * chunked.budget
        return Step("prefill", count, (least, most), f"{most:,} tokens a step", False, "eager", why)
    prompts = _prompts_at_once(batch, running, chunked.budget)
    count = -(-running // prompts)
    last = running - (count - 1) * prompts
    tokens = (last * batch.input_len, prompts * batch.input_len)
    return Step("prefill", count, tokens, f"{batch.input_len:,} x {prompts} tokens", False, "eager", why)


def _decode(batch: Batch, running: int, longest: int) -> list[Step]:
    """Each decode step sees one token more; the first one sees the input and the token that prefill gave."""
    first, last = batch.input_len + 1, batch.total_len - 1
    padded = padded_size(running, CAPTURE_SIZES)
    assert padded is not None, running
    steps = []
    if first <= min(last, longest):
        positions = (first, min(last, longest))
        steps.append(_decode_step(running, positions, padded, f"length <= {longest:,}, batch <= {MAX_NUM_SEQS}"))
    if max(first, longest + 1) <= last:
        positions = (max(first, longest + 1), last)
        steps.append(_decode_step(running, positions, None, f"length > {longest:,}"))
    return steps


def _decode_step(running: int, positions: tuple[int, int], padded: int | None, why: str) -> Step:
    captured = padded is not None
    return Step(
        phase="decode",
        count=positions[1] - positions[0] + 1,
        tokens=(running, running),
        detail=count_tokens(running) + (f" padded to {padded}" if captured else ""),
        captured=captured,
        graph="full" if captured else "eager",
        why=why,
        positions=positions,
        padded=padded,
    )
