"""A fixed batch that decodes: one request of many prompts, timed while all of them generate."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

from ep.errors import EpError

_INDEX, _TOKENS = re.compile(rb'"index":\s*(\d+)'), re.compile(rb'"completion_tokens":\s*(\d+)')
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Batch:
    """Prompts of random tokens, all of one length; a longer batch of the same seed starts with the shorter one's."""

    num_requests: int
    input_len: int
    output_len: int
    seed: int

    def prompts(self) -> list[list[int]]:
        """Token ids; the lowest are special ones."""
        picks = [random.Random(self.seed * 100_003 + i) for i in range(self.num_requests)]
        return [[pick.randrange(16, 256) for _ in range(self.input_len)] for pick in picks]

    @property
    def max_tokens(self) -> int:
        """Those that start first have to go on until the last one has its output_len: prefill takes at most a step for
        each request in between."""
        return self.output_len + self.num_requests + 16


@dataclass(frozen=True)
class Decoded:
    """While all of the batch decode. step_ms: the median time from one token of a request to its next; mean_ms: the
    mean. first_ms: from sending the batch until all have a token."""

    step_ms: float
    mean_ms: float
    first_ms: float


def decode(batch: Batch, url: str, model: str, on_start: Callable[[], None] | None = None) -> Decoded:
    """Until every request has output_len tokens more than when the last of them started; the rest is given up.

    on_start: called when all have started. Raises EpError where the server ends a request before, or refuses.
    """
    seen: list[list[tuple[int, float]]] = [[] for _ in range(batch.num_requests)]
    sent, started, begun, done = time.perf_counter(), 0.0, [0] * batch.num_requests, 0
    with _chunks(batch, url, model) as chunks:
        for request_idx, num_tokens, now in chunks:
            of_request = seen[request_idx]
            before = of_request[-1][0] if of_request else 0
            of_request.append((num_tokens, now))
            if not started:
                if all(seen):
                    started, begun = now, [stream[-1][0] for stream in seen]
                    if on_start is not None:
                        on_start()
            elif before < begun[request_idx] + batch.output_len <= num_tokens:
                done += 1
                if done == batch.num_requests:
                    return summarize(seen, begun, batch.output_len, 1e3 * (started - sent))
    raise EpError(f"{url}: ended after {done} of {batch.num_requests} requests had their {batch.output_len} tokens")


def summarize(
    seen: Sequence[Sequence[tuple[int, float]]], begun: Sequence[int], output_len: int, first_ms: float
) -> Decoded:
    """seen: of each request, its tokens so far and when (seconds). begun: tokens that each had when all had started. A
    piece that brings several tokens at once is as many gaps of the same length."""
    gaps, means = [], []
    for stream, first in zip(seen, begun, strict=True):
        window = [(tokens, at) for tokens, at in stream if first <= tokens <= first + output_len]
        for (tokens, at), (more, later) in pairwise(window):
            gaps += [(later - at) / (more - tokens)] * (more - tokens)
        means.append((window[-1][1] - window[0][1]) / (window[-1][0] - window[0][0]))
    return Decoded(1e3 * statistics.median(gaps), 1e3 * statistics.fmean(means), first_ms)


@contextmanager
def _chunks(batch: Batch, url: str, model: str) -> Iterator[Iterator[tuple[int, int, float]]]:
    """(request, its tokens so far, time) of every piece that the server sends."""
    body = {
        "model": model,
        "prompt": batch.prompts(),
        "max_tokens": batch.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("EP_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise EpError(f"{url}: /v1/completions answers {response.status}: {response.read(500).decode()}")
        yield _pieces(response)
    except (OSError, http.client.HTTPException) as error:
        raise EpError(f"{url}: {type(error).__name__} {error}") from error
    finally:
        connection.close()


def _pieces(response: http.client.HTTPResponse) -> Iterator[tuple[int, int, float]]:
    for line in response:
        index, tokens = _INDEX.search(line), _TOKENS.search(line)
        if index and tokens:
            yield int(index.group(1)), int(tokens.group(1)), time.perf_counter()
