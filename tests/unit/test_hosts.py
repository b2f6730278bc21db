"""Hosts as network namespaces: their links, their end, and what a killed maker leaves behind."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ep.bench.hosts import relay
from ep.bench.hosts.link_quality import LinkQuality
from ep.bench.hosts.network import Network, cannot_make_hosts, sweep
from ep.bench.hosts.owner import is_left_over, own_name
from ep.cluster import hosts as watching
from ep.cluster.host_lines import SILENT_S, HostLines
from ep.cluster.hosts import LOST_S, HostWatch

PORT = 7000
ECHO = f"""
import socket
server = socket.create_server(("", {PORT}))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(65536):
        connection.sendall(data)
"""


@pytest.fixture(scope="module")
def allowed() -> None:
    why_not = cannot_make_hosts()
    if why_not is not None:
        pytest.skip(why_not)


@pytest.fixture
def network(allowed: None) -> Iterator[Network]:
    """Host 0 as it is, host 1 slow, an echo server on each."""
    network = Network(2, {1: LinkQuality(delay_ms=20, rate_mbit=50)})
    try:
        for host_idx in range(2):
            command = [*network.inside(host_idx), sys.executable, "-c", ECHO]
            server = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield network
    finally:
        network.close()
    assert not namespaces(own_name())


def namespaces(start: str) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"{start}*")]


def seconds(address: str, num_bytes: int) -> float:
    """Of the median round trip of five."""
    found = []
    with socket.create_connection((address, PORT), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(5):
            start, left = time.perf_counter(), num_bytes
            connection.sendall(bytes(num_bytes))
            while left:
                left -= len(connection.recv(65536))
            found.append(time.perf_counter() - start)
    return sorted(found)[2]


def test_a_slow_link_is_slow(network: Network) -> None:
    near, far = network.addresses
    assert seconds(near, 64) < 0.02 and 0.04 <= seconds(far, 64) < 0.2
    assert seconds(far, 125_000) > 2 * 0.02, "125 kB at 50 Mbit/s take 20 ms each way"


def test_a_cut_host_falls_silent(network: Network) -> None:
    near, far = ((address, PORT) for address in network.addresses)
    lines = HostLines()
    assert lines.silent([near, far], 2.0) == {}
    opened = lines.heard[far]
    time.sleep(SILENT_S + 0.3)
    assert lines.silent([near, far], 0.0) == {}, "nothing was said, but the heartbeat was answered"
    assert lines.heard[far] > opened
    network.cut(1)
    start = time.monotonic()
    while not (silent := lines.silent([near, far], 0.5)):
        assert time.monotonic() - start < SILENT_S + 2.0
        time.sleep(0.1)
    assert silent == {far: "does not answer"}
    assert lines.silent([near, far], 0.5) == {far: "does not answer"}
    assert time.time() - lines.heard[far] > SILENT_S > time.time() - lines.heard[near]
    network.mend(1)
    assert lines.silent([near, far], 3.0) == {}
    lines.close()


def test_who_answers_in_time_is_not_lost_to_one_who_asks_late() -> None:
    lines = HostLines()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()
        assert lines.silent([port], timeout_s=0.0) == {}
        line = server.accept()[0]
        assert lines.silent([port], timeout_s=0.0) == {} and not select.select([server], [], [], 0)[0], "one line"
        line.close()
        assert lines.silent([port], timeout_s=0.0) == {}, "a server may hang up"
        assert server.accept()
    assert lines.silent([port], timeout_s=1.0) == {port: "Connection refused"}
    assert lines.silent([], timeout_s=1.0) == {}
    lines.close()


def test_a_host_is_lost_once_it_is_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    watch = HostWatch(["10.0.0.1", "10.0.0.2"], told.append)
    now, ports = time.time(), {"10.0.0.1": 1, "10.0.0.2": 2}
    silent = {("10.0.0.2", 2): "does not answer"}
    monkeypatch.setattr(watching.time, "time", lambda: now)
    watch._lines.heard = {("10.0.0.1", 1): now, ("10.0.0.2", 2): now}
    watch._look(watch._hosts, ports, silent)
    now += LOST_S - 0.1
    watch._look(watch._hosts, ports, silent)
    assert not told and not watch.lost("10.0.0.2")
    now += 0.1
    for _ in range(2):
        watch._look(watch._hosts, ports, silent)
    assert told == ["10.0.0.2"] and watch.lost("10.0.0.2") == "does not answer" and not watch.lost("10.0.0.1")
    assert watch.status()[1]["lost_after_s"] == LOST_S
    watch._look(watch._hosts, ports, {})
    assert not watch.lost("10.0.0.2"), "it is back"
    watch._look(watch._hosts, {"10.0.0.2": 2}, {})
    assert told == ["10.0.0.2", "10.0.0.1"] and watch.lost("10.0.0.1") == "Ray counts it as dead"


def test_what_a_killed_maker_leaves_is_taken_down(allowed: None) -> None:
    code = (
        "import subprocess, sys, time\n"
        "from ep.bench.hosts.network import Network\n"
        "network = Network(1, {})\n"
        "child = subprocess.Popen([*network.inside(0), 'sleep', '600'])\n"
        "print(network.inside(0)[-1], child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    name, child = maker.stdout.readline().split()
    sweep()
    assert namespaces(name), "its maker lives"
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert namespaces(name)
    sweep()
    assert not namespaces(name)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


def test_names_tell_whose_they_are() -> None:
    assert not is_left_over(f"{own_name()}-host0")
    pid, started = own_name().rsplit("-", 2)[1:]
    assert is_left_over(f"ep-hosts-{pid}-{int(started) - 1}-host0"), "another process with this pid"
    assert not is_left_over("ep-hosts-of-somebody-else") and not is_left_over("other")


def test_the_relay_delays_and_loses_frames() -> None:
    """Between two sockets that stand for its devices."""
    (one, one_end), (other, other_end) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    for sock in (one_end, other_end):
        sock.setblocking(False)
    stop_read, stop_write = os.pipe()
    loss, num_frames = 0.25, 400
    arguments = (one_end.fileno(), other_end.fileno(), 0.05, loss, random.Random(0), stop_read)
    thread = threading.Thread(target=relay.carry, args=arguments)
    thread.start()
    try:
        start = time.monotonic()
        other.settimeout(1.0)
        came = []
        for number in range(num_frames):
            one.send(number.to_bytes(2, "big"))
            if number % 50 == 49:
                time.sleep(0.01)
        first = None
        while True:
            try:
                came.append(int.from_bytes(other.recv(10), "big"))
            except TimeoutError:
                break
            first = first or time.monotonic() - start
        assert first is not None and first >= 0.05
        assert came == sorted(came), "in order"
        lost = num_frames - len(came)
        assert abs(lost - loss * num_frames) < 4 * (num_frames * loss * (1 - loss)) ** 0.5
        other.send(b"back")
        one.settimeout(1.0)
        assert one.recv(10) == b"back"
    finally:
        os.write(stop_write, b"x")
        thread.join()


def test_a_link_in_the_words_of_tc() -> None:
    slow = LinkQuality(5, 0.01, 100)
    assert slow.netem() == ("netem", "delay", "5ms", "loss", "1%", "rate", "100mbit")
    assert LinkQuality(rate_mbit=8).tbf() == ("tbf", "rate", "8mbit", "burst", "16384b", "latency", "50ms")
    assert slow.describe() == "5 ms delay, 1.0% loss, 100 Mbit/s" and LinkQuality().describe() == "nothing"
    assert slow.needs_delay and not LinkQuality(rate_mbit=8).needs_delay
