"""The router against shards in processes of their own that die, hang and come back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ep.errors import DeadlineError, ShardFailedError, ShardLostError, TransportError
from ep.placement import even_split
from ep.router import Router
from ep.shard import Shard
from ep.transport import shm
from ep.transport.base import Endpoint
from ep.transport.handshake import Greeting
from ep.transport.sockets import SocketTransport
from ep.wire import Dispatch
from tests.unit.shards import KEY, NODE, HungShard, ShardProcess, SlowShard, even_shard, make_spec, random_routing

SPEC = make_spec()
PLACEMENT = even_split(SPEC.num_moe_layers, SPEC.num_experts, 2)
GREETING = Greeting.of(SPEC, "router-0", 64)
NODES = {"shm": NODE, "tcp": "node-b"}
Start = Callable[[int, type[Shard]], ShardProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts shard processes in a folder of their own, ends them afterwards."""
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    started: list[ShardProcess] = []

    def start(shard_idx: int, shard_class: type[Shard] = Shard) -> ShardProcess:
        started.append(ShardProcess.start(folder, even_shard, shard_idx, 2, torch.bfloat16, shard_class))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture(params=list(NODES))
def node(request: pytest.FixtureRequest) -> str:
    return NODES[request.param]


def connect(processes: list[ShardProcess], node: str) -> SocketTransport:
    return SocketTransport([process.endpoint for process in processes], GREETING, KEY, node)


def answers(router: Router, num_tokens: int = 16) -> torch.Tensor:
    hidden, ids, weights = random_routing(SPEC, num_tokens)
    return router.moe(1, hidden.bfloat16(), ids, weights)


def test_a_shard_killed_mid_request_is_replaced_and_the_result_is_the_same(start: Start, node: str) -> None:
    processes = [start(0, Shard), start(1, Shard)]
    lost: list[tuple[int, str]] = []

    def bring_back(shard_idx: int, error: TransportError) -> Endpoint:
        lost.append((shard_idx, str(error)))
        return start(shard_idx, Shard).endpoint

    transport = connect(processes, node)
    router = Router(SPEC, PLACEMENT, transport, deadline_s=30, on_shard_lost=bring_back)
    wanted = answers(router)
    requests = router.stats()[0].requests
    computing = start(1, HungShard)
    transport.replace(1, computing.endpoint)
    killer = threading.Timer(0.1, computing.kill)
    killer.start()
    found = answers(router)
    killer.join()
    assert torch.equal(found, wanted)
    assert [shard_idx for shard_idx, _ in lost] == [1] and "connection ended" in lost[0][1]
    (recovery,) = router.recoveries
    assert (recovery.shard_idx, recovery.layer_pos) == (1, 1) and recovery.seconds > 0
    # The other shard was asked once: its partial was kept.
    assert router.stats()[0].requests == requests + 1
    assert torch.equal(answers(router), wanted)
    router.close()


def test_without_a_way_back_the_loss_names_the_shard_and_the_rest_lives(start: Start, node: str) -> None:
    processes = [start(0, Shard), start(1, Shard)]
    transport = connect(processes, node)
    router = Router(SPEC, PLACEMENT, transport, deadline_s=30)
    wanted = answers(router)
    processes[1].kill()
    for _ in range(2):
        with pytest.raises(ShardLostError, match="shard 1") as caught:
            answers(router)
        assert caught.value.shard_idx == 1
    transport.replace(1, start(1, Shard).endpoint)
    assert torch.equal(answers(router), wanted)
    router.close()


def test_a_replacement_that_fails_too_is_asked_for_again_but_not_for_ever(start: Start) -> None:
    processes = [start(0, Shard), start(1, Shard)]
    router = Router(SPEC, PLACEMENT, connect(processes, NODE), on_shard_lost=lambda _idx, _error: processes[1].endpoint)
    processes[1].kill()
    with pytest.raises(ShardLostError, match="cannot be reached"):
        answers(router)
    assert router.recoveries == []
    router.close()


def test_a_silent_shard_ends_in_a_deadline_error_that_names_it(start: Start, node: str) -> None:
    processes = [start(0, Shard), start(1, HungShard)]
    router = Router(SPEC, PLACEMENT, connect(processes, node), deadline_s=0.3)
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match=r"shard 1: no answer within 0\.3") as caught:
        answers(router)
    assert caught.value.shard_idx == 1
    assert time.monotonic() - begin < 2
    processes[1].kill()
    router.close()


def test_late_answers_are_thrown_away(start: Start, node: str) -> None:
    """A call that fails leaves another shard's answer under way: it must not be taken for the next call's."""
    processes = [start(0, SlowShard), start(1, Shard)]
    transport = connect(processes, node)
    router = Router(SPEC, PLACEMENT, transport)
    wanted = answers(router)
    hidden, ids, weights = random_routing(SPEC, 16, seed=5)
    computing = start(1, HungShard)
    transport.replace(1, computing.endpoint)
    router.dispatch(0, hidden.bfloat16(), ids, weights)
    computing.kill()
    with pytest.raises(ShardLostError, match="shard 1"):
        router.combine(0)
    transport.replace(1, processes[1].endpoint)
    assert torch.equal(answers(router), wanted)
    router.dispatch(0, hidden.bfloat16(), ids, weights)  # and never combined
    assert torch.equal(answers(router), wanted)
    router.close()


def test_ping_is_a_round_trip_without_tensors(start: Start, node: str) -> None:
    process = start(0, Shard)
    transport = connect([process], node)
    assert 0 < transport.ping(0, 5.0) < 1
    process.kill()
    with pytest.raises(ShardLostError):
        transport.ping(0, 5.0)
    transport.close()


def test_a_request_that_the_shard_refuses_names_it_and_leaves_the_link_sound(start: Start, node: str) -> None:
    transport = connect([start(0, Shard)], node)
    for message, reason in (
        (Dispatch(1, 0, 9, "bf16", "f32", 1, 1), "MoE layer is 9"),
        (Dispatch(2, 5, 0, "bf16", "f32", 1, 1), "generation is 5"),
        (Dispatch(3, 0, 0, "bf16", "f32", 1, 1), "slot is out of range"),
        (Dispatch(4, 0, 0, "bf16", "f32", 1, 2), "counts are not those"),
    ):
        views = transport.prepare(0, message, time.monotonic() + 5)
        views.counts[:] = 1
        views.slot_ids[:] = -1 if "slot" in reason else 0
        views.weights[:] = 1
        views.rows[:] = 0
        transport.dispatch(0)
        with pytest.raises(ShardFailedError, match=f"shard 0.*{reason}"):
            transport.receive(time.monotonic() + 5)
    assert transport.ping(0, 5.0) > 0
    transport.close()


def test_shards_of_a_node_are_reached_without_tcp(start: Start) -> None:
    process = start(0, Shard)
    for node, way in ((NODE, "unix:"), ("node-b", "tcp:127.0.0.1:")):
        transport = connect([process], node)
        assert transport.describe(0).startswith(way)
        transport.close()


def test_wrong_key_wrong_model_and_nobody_there_are_told_apart(start: Start, node: str) -> None:
    process = start(0, Shard)
    with pytest.raises(ShardLostError, match="shard 0: cannot be reached"):
        SocketTransport([process.endpoint], GREETING, b"x" * 32, node)
    with pytest.raises(ShardLostError, match="hidden size is 128, expected 64"):
        SocketTransport([process.endpoint], replace(GREETING, hidden_size=128), KEY, node)
    with pytest.raises(ShardLostError, match="model is"):
        SocketTransport([process.endpoint], replace(GREETING, fingerprint="other"), KEY, node)
    with pytest.raises(ShardLostError, match="cannot be reached"):
        SocketTransport([replace(process.endpoint, unix_path="/nowhere", tcp_port=1)], GREETING, KEY, node)
    unreachable = replace(process.endpoint, tcp_host=None, tcp_port=None)
    with pytest.raises(ShardLostError, match="listens on node node-a only"):
        SocketTransport([unreachable], GREETING, KEY, "node-b")
    assert connect([process], node).ping(0, 5.0) > 0


def test_an_impostor_without_the_key_gets_nothing(tmp_path: Path) -> None:
    """A process that took over a shard's address cannot make a router believe it."""
    path = str(tmp_path / "impostor.sock")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    heard: list[bytes] = []

    def pretend() -> None:
        sock, _ = listening.accept()
        sock.sendall(b"EPAUTH01" + b"n" * 32)
        heard.append(sock.recv(4096))
        sock.sendall(b"EPAUTH01" + b"p" * 32)
        heard.append(sock.recv(4096))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(ShardLostError, match="does not know the cluster's key"):
        SocketTransport([Endpoint(0, NODE, path, None, None)], GREETING, KEY, NODE)
    thread.join()
    assert len(heard[0]) == 72 and heard[1] == b""
    assert KEY not in heard[0]
    listening.close()


@pytest.mark.skipif(not shm.supports()[0], reason=shm.supports()[1])
def test_killed_processes_leave_no_shared_memory_behind(start: Start) -> None:
    before = sorted(path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("ep"))
    process = start(0, Shard)
    transport = connect([process], NODE)
    process.kill()
    transport.close()
    assert sorted(path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("ep")) == before
