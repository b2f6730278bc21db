"""Routers and shards of one machine over ipc, with real experts, threads, processes and shared memory."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.errors import ShardLostError
from ep.ipc_router import MAX_FAILED_IN_ROW, IpcRouter
from ep.ipc_setup import MESSAGE_TOKENS
from ep.load import Window
from ep.placement import Placement
from ep.recorder import LoadRecorder
from ep.share import WHOLE, Share
from tests.unit.ipc_node import EXPERTS, NUM_SHARDS, PLACEMENT, SPEC, Node, ShardProcess, make_options
from tests.unit.shards import expected, random_routing, relative_error

BF16, FP8 = 0.02, 0.06


def check_layer(
    router: IpcRouter, layer_pos: int, num_tokens: int, seed: int = 0, bound: float = BF16, num_real: int | None = None
) -> None:
    """One layer of one batch, against the reference on float64; num_real: rows that are not padding."""
    hidden, ids, weights = random_routing(SPEC, num_tokens, seed)
    hidden = hidden.bfloat16()
    router.dispatch(layer_pos, hidden, ids, weights)
    routed = router.combine(layer_pos)
    rows = router.share.rows(num_tokens)
    real = slice(0, num_tokens if num_real is None else num_real)
    wanted = expected(EXPERTS[layer_pos], hidden, ids, weights)[real][rows]
    assert routed.shape == (router.share.length(num_tokens), SPEC.hidden_size) and routed.dtype == torch.bfloat16
    assert relative_error(routed[: len(wanted)], wanted) < bound


def run_step(router: IpcRouter, num_tokens: int, num_requests: int, seed: int = 0) -> None:
    """All layers of a step that must be whole."""
    with router.step(num_tokens, num_requests) as step:
        for layer_pos in range(SPEC.num_moe_layers):
            check_layer(router, layer_pos, num_tokens, seed)
    assert router.failure(step) is None


@pytest.mark.parametrize(("rows", "partials", "bound"), [("bf16", "f32", BF16), ("fp8", "bf16", FP8)])
def test_batches_of_any_size_are_the_references(rows: str, partials: str, bound: float) -> None:
    with Node(make_options(1, rows, partials)) as node:
        router = node.router()
        for num_tokens in (1, 7, MESSAGE_TOKENS, MESSAGE_TOKENS + 1, 2 * MESSAGE_TOKENS + 40):
            with router.step(num_tokens, 1) as step:
                check_layer(router, step % SPEC.num_moe_layers, num_tokens, step, bound)
            assert router.failure(step) is None


def test_rows_that_are_padding() -> None:
    with Node(make_options(1)) as node:
        router = node.router()
        for num_tokens in (3, MESSAGE_TOKENS + 5):
            hidden, ids, weights = random_routing(SPEC, num_tokens + 4)
            with router.step(num_tokens, 1) as step:
                router.dispatch(1, hidden.bfloat16(), ids, weights)
                routed = router.combine(1)
            assert router.failure(step) is None
            wanted = expected(EXPERTS[1], hidden.bfloat16(), ids, weights)
            assert relative_error(routed[:num_tokens], wanted[:num_tokens]) < BF16
        router.take_load()
        rows = sum((3, MESSAGE_TOKENS + 5))
        assert sum(link.pairs for link in router.stats()) == rows * SPEC.top_k


def test_a_shard_of_another_node_in_the_same_layers() -> None:
    with Node(make_options(1)) as node:
        router = node.router(far=1, deadline_s=2.0)
        for num_tokens in (1, 9, MESSAGE_TOKENS + 3):
            run_step(router, num_tokens, 1)
        router.take_load()
        near, far = router.stats()
        assert far.tokens > 0 and sum(far.histogram) == far.requests > 0 < near.requests
        rows = sum((1, 9, MESSAGE_TOKENS + 3)) * SPEC.num_moe_layers
        assert near.pairs + far.pairs == rows * SPEC.top_k
        node.far_shards[1].close()
        start = time.monotonic()
        with router.step(5, 1) as step:
            hidden, ids, weights = random_routing(SPEC, 5)
            for layer_pos in range(SPEC.num_moe_layers):  # goes on to its end, as other ranks may wait for it
                router.dispatch(layer_pos, hidden.bfloat16(), ids, weights)
                assert router.combine(layer_pos).shape == hidden.shape
        failure = router.failure(step)
        assert failure is not None and not failure.again and "shard 1" in str(failure.error)
        assert time.monotonic() - start < 2.0


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(1, 50), padding=st.integers(0, 8), num_decode=st.integers(0, 50), size=st.integers(2, 3))
def test_shares_of_a_batch_make_the_whole(num_tokens: int, padding: int, num_decode: int, size: int) -> None:
    num_decode = min(num_decode, num_tokens)
    windows: list[Window] = []
    with Node(make_options(size)) as node:
        for rank in range(size):
            router = node.router(rank, Share(rank, size))
            router.recorder = LoadRecorder(SPEC, NUM_SHARDS, rank, on_window=windows.append)
            router.recorder.before_close = router.take_load
            with router.step(num_tokens, 1, num_decode) as step:
                for layer_pos in range(SPEC.num_moe_layers):
                    check_layer(router, layer_pos, num_tokens + padding, num_real=num_tokens)
            assert router.failure(step) is None
            router.recorder.flush()
    assert sum(window.num_decode_tokens for window in windows) == num_decode
    assert sum(window.num_prefill_tokens for window in windows) == num_tokens - num_decode
    pairs = SPEC.top_k * SPEC.num_moe_layers
    assert sum(window.decode.sum() for window in windows) == num_decode * pairs
    assert sum(window.prefill.sum() for window in windows) == (num_tokens - num_decode) * pairs


def test_routers_that_wait_for_nobody() -> None:
    """Three of them at different speeds, and one that never sends."""
    with Node(make_options(4), in_process=False) as node:
        failures: list[BaseException] = []

        def work(router: IpcRouter, seed: int) -> None:
            try:
                for turn in range(8):
                    run_step(router, 1 + (seed + turn) % 9, 1, turn)
                    time.sleep(0.01 * seed)
            except BaseException as error:
                failures.append(error)

        node.router(3)
        threads = [threading.Thread(target=work, args=(node.router(rank), rank)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures


@pytest.mark.parametrize("share", [WHOLE, Share(0, 2)], ids=["whole", "share"])
def test_a_killed_shard_ends_the_step_soon_and_the_next_one_finds_its_successor(share: Share) -> None:
    with Node(make_options(2), in_process=False) as node:
        router = node.router(share=share)
        run_step(router, 6, 1)
        killed = node.shards[1]
        assert isinstance(killed, ShardProcess)
        start = 0.0

        def kill() -> None:
            nonlocal start
            killed.kill()
            start = time.monotonic()

        with router.step(6, 6) as step:
            check_layer(router, 0, 6)
            kill()
            hidden, ids, weights = random_routing(SPEC, 6)
            router.dispatch(1, hidden.bfloat16(), ids, weights)
            router.combine(1)
            assert time.monotonic() - start < 1.0
        failure = router.failure(step)
        assert failure is not None and failure.again and "process" in str(failure.error)
        run_step(router, 6, 1)
        assert [recovery.shard_idx for recovery in router.recoveries] == [1]
        node.shards[1].kill()  # type: ignore[union-attr]
        run_step(router, 6, 1)  # found between steps: nothing is lost
        assert len(router.recoveries) == 2


@pytest.mark.parametrize("share", [WHOLE, Share(1, 2)], ids=["whole", "share"])
def test_a_shard_that_does_not_come_back_ends_every_step_at_once(share: Share) -> None:
    with Node(make_options(2), in_process=False) as node:
        router = node.router(rank=1, share=share, replace=False)
        node.shards[0].kill()  # type: ignore[union-attr]
        for _ in range(MAX_FAILED_IN_ROW + 2):
            start = time.monotonic()
            if share == WHOLE:
                with pytest.raises(ShardLostError, match="shard 0"), router.step(4, 4):
                    pass
            else:  # the others are in the step: this router goes on beside them
                with router.step(4, 4) as step:
                    hidden, ids, weights = random_routing(SPEC, 4)
                    for layer_pos in range(SPEC.num_moe_layers):
                        router.dispatch(layer_pos, hidden.bfloat16(), ids, weights)
                        router.combine(layer_pos)
                failure = router.failure(step)
                assert failure is not None and not failure.again
            assert time.monotonic() - start < 1.0


def test_a_silent_shard_is_late_and_replaced() -> None:
    with Node(make_options(1)) as node:
        router = node.router(deadline_s=0.3)
        run_step(router, 5, 1)
        node.shards[0]._server.stop()  # type: ignore[union-attr]
        with router.step(5, 1) as step:
            hidden, ids, weights = random_routing(SPEC, 5)
            router.dispatch(0, hidden.bfloat16(), ids, weights)
            router.combine(0)
        failure = router.failure(step)
        assert failure is not None and failure.again and "no answer within 0.3 s" in str(failure.error)
        run_step(router, 5, 1)


def test_outside_of_steps_nobody_is_asked() -> None:
    """As vLLM warms up, when kernels that have never run must not have to wait for an answer."""
    with Node(make_options(1)) as node:
        router = node.router()
        hidden, ids, weights = random_routing(SPEC, 9)
        for layer_pos in range(SPEC.num_moe_layers):
            router.dispatch(layer_pos, hidden.bfloat16(), ids, weights)
            routed = router.combine(layer_pos)
            assert routed.shape == hidden.shape and not routed.any()
        router.take_load()
        assert not any(link.requests or link.pairs for link in router.stats())
        run_step(router, 9, 9)
        router.take_load()
        assert all(link.requests == SPEC.num_moe_layers for link in router.stats())


def test_load_is_what_the_tokens_chose() -> None:
    with Node(make_options(1)) as node:
        router = node.router()
        windows: list[Window] = []
        router.recorder = LoadRecorder(SPEC, NUM_SHARDS, window_s=1000, on_window=windows.append)
        router.recorder.before_close = router.take_load
        run_step(router, 7, 7, seed=1)  # decode
        run_step(router, 9, 2, seed=2)  # prefill
        router.recorder.flush()
        (window,) = windows
        chosen = [random_routing(SPEC, num, seed)[1].numpy().ravel() for num, seed in ((7, 1), (9, 2))]
        wanted = [np.bincount(ids, minlength=SPEC.num_experts) for ids in chosen]
        assert np.array_equal(window.decode, [wanted[0]] * SPEC.num_moe_layers)
        assert np.array_equal(window.prefill, [wanted[1]] * SPEC.num_moe_layers)
        assert (window.num_steps, window.num_decode_tokens, window.num_prefill_tokens) == (2, 7, 9)
        pairs = sum(link.pairs for link in window.links)
        assert pairs == 16 * SPEC.top_k * SPEC.num_moe_layers
        assert all(link.requests == 2 * SPEC.num_moe_layers and link.bytes_out > 0 for link in window.links)


def test_a_placement_that_nobody_serves_fails_its_steps_for_good() -> None:
    with Node(make_options(1)) as node:
        router = node.router()
        run_step(router, 4, 1)
        router.set_placement(Placement(9, SPEC.num_experts, PLACEMENT.slots))
        with router.step(4, 1) as step:
            hidden, ids, weights = random_routing(SPEC, 4)
            router.dispatch(0, hidden.bfloat16(), ids, weights)
            router.combine(0)
        failure = router.failure(step)
        assert failure is not None and not failure.again and "generation 9" in str(failure.error)
        router.set_placement(PLACEMENT)
        run_step(router, 4, 1)
