"""Runs of vLLM's benchmark client: a fixed number of prompts, in flight or by the second, greedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep.bench.prompts import PromptFile
from ep.bench.vllm_client import SERVE
from ep.errors import EpError

_LATENCIES = ("ttft", "tpot", "itl")
_PERCENTILES = (50, 90, 99)
_MOST_WARMUPS = 16


@dataclass(frozen=True)
class Load:
    """What the client sends. concurrency: requests in flight at most, as many warm up before; None: no bound.
    input_len, output_len: tokens of every request, all of them random; of `prompts`, where that is given, there are as
    many as it says. request_rate: requests a second, sent at random times; None: as soon as concurrency allows."""

    concurrency: int | None
    input_len: int
    output_len: int
    num_prompts: int
    seed: int
    request_rate: float | None = None
    prompts: PromptFile | None = None


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Served:
    """What the client saw, its warm-up left out.

    output_tokens_per_s: all output tokens by the whole duration, prefill included; total_tokens_per_s: the prompts'
    too. ttft: from request to first token. tpot: a request's time per token after the first. itl: between two tokens of
    a request. num_failed: requests without an answer, which the other figures leave out.
    """

    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    num_failed: int = 0


class Client:
    """vLLM's client in a process of its own, for any number of runs one after the other; ended with the context.

    logs: each run's log and raw result go to logs/client-NAME.{log,json}. A server that asks for a key gets the one of
    EP_API_KEY.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        with (logs / "client.log").open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ep.bench.vllm_client", SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                bufsize=1,
                env=_environment(),
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def run(self, load: Load, url: str, model: str, tokenizer: str, name: str, may_fail: bool = False) -> Served:
        """Raises EpError, with the log's path, when the client fails or, unless may_fail, a request does."""
        log, result = self._logs / f"client-{name}.log", self._logs / f"client-{name}.json"
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps([client_flags(load, url, model, tokenizer, result), str(log)]), file=self._process.stdin)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise EpError(f"{log}: vLLM's benchmark client ended with exit code {self._process.wait()}")
        if (wrong := json.loads(answer)) or not result.is_file():
            raise EpError(f"{log}: vLLM's benchmark client: {wrong or 'no result'}")
        raw: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if raw["completed"] != load.num_prompts and not may_fail:
            raise EpError(f"{log}: {url} answered {raw['completed']} of {load.num_prompts} requests")
        return read_result(raw)


def client_flags(load: Load, url: str, model: str, tokenizer: str, result: Path) -> list[str]:
    """The client's command line but for its name; its result goes to the file `result`."""
    flags: dict[str, Any] = {
        "backend": "vllm",
        "base-url": url,
        "model": model,
        "tokenizer": tokenizer,
        "num-prompts": load.num_prompts,
        "num-warmups": load.concurrency or min(load.num_prompts, _MOST_WARMUPS),
        "seed": load.seed,
        "temperature": 0,
        "percentile-metrics": ",".join(_LATENCIES),
        "metric-percentiles": ",".join(map(str, _PERCENTILES)),
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    switches = ["--save-result", "--ignore-eos", "--disable-tqdm"]
    if load.prompts is None:
        flags |= {"dataset-name": "random", "random-input-len": load.input_len, "random-output-len": load.output_len}
    else:
        flags |= {"dataset-name": "custom", "dataset-path": load.prompts.path}
        flags |= {"custom-output-len": load.prompts.output_len or -1}
        switches.append("--skip-chat-template")
    if load.concurrency is not None:
        flags["max-concurrency"] = load.concurrency
    if load.request_rate is not None:
        flags["request-rate"] = load.request_rate
    return switches + [f"--{key}={value}" for key, value in flags.items()]


def read_result(raw: dict[str, Any]) -> Served:
    """From the JSON that the client writes."""
    ttft, tpot, itl = (Percentiles(*(raw[f"p{p}_{name}_ms"] for p in _PERCENTILES)) for name in _LATENCIES)
    return Served(
        raw["duration"],
        raw["request_throughput"],
        raw["output_throughput"],
        raw["total_token_throughput"],
        ttft,
        tpot,
        itl,
        raw["num_prompts"] - raw["completed"],
    )


def _environment() -> dict[str, str]:
    key = os.environ.get("EP_API_KEY")
    return {**os.environ, "OPENAI_API_KEY": key} if key else dict(os.environ)
