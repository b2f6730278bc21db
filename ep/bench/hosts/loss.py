"""A host that is cut off while it serves, and how soon that is named."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ep.bench.greedy import greedy_tokens
from ep.bench.hosts.cluster import HostCluster
from ep.bench.hosts.serving import lost_hosts
from ep.bench.server import Server, served_model
from ep.errors import EpError

_PATIENCE_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True)
class HostLoss:
    """named_s: from the cut until `ep status` named the host, the command's own start included. status: what it said.
    error: what a request was told then, "" where it was answered."""

    host: str
    named_s: float
    status: str
    error: str


def lose_later(
    cluster: HostCluster, host_idx: int, server: Server, after_tokens: int, after_s: float
) -> Future[HostLoss]:
    """In a thread: cuts the host off after_s seconds after the server has made more than after_tokens from now on, and
    waits until that is named.

    The result raises EpError where it is not.
    """
    host, model, before = cluster.addresses[host_idx], served_model(server.url), server.generated_tokens()

    def lose() -> HostLoss:
        while server.generated_tokens() <= before + after_tokens:
            time.sleep(_POLL_S)
        time.sleep(after_s)
        cluster.lose(host_idx)
        start = time.monotonic()
        while not (named := [sentence for sentence in lost_hosts(cluster) if host in sentence]):
            if time.monotonic() - start > _PATIENCE_S:
                raise EpError(f"host {host} was cut off {_PATIENCE_S:g} s ago, and `ep status` does not say so")
        return HostLoss(host, round(time.monotonic() - start, 1), named[0], _told(server.url, model))

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(lose)
    finally:
        pool.shutdown(wait=False)


def _told(url: str, model: str) -> str:
    try:
        greedy_tokens(url, model, seed=0, num_prompts=1)
    except EpError as error:
        return str(error)
    return ""
