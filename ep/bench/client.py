"""One run of vLLM's benchmark client: a fixed number of random prompts, a fixed number of them in flight, greedy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep.errors import EpError

_LATENCIES = ("ttft", "tpot", "itl")
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """Lengths in tokens; every request has exactly these. concurrency: requests in flight, as many warm up before."""

    concurrency: int
    input_len: int
    output_len: int
    num_prompts: int
    seed: int


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Served:
    """What the client saw, its warm-up left out.

    output_tokens_per_s: all output tokens by the whole duration, prefill included. ttft: from request to first token.
    tpot: a request's time per token after the first. itl: between two tokens of a request. num_failed: requests without
    an answer, which the other figures leave out.
    """

    duration_s: float
    output_tokens_per_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    num_failed: int = 0


def run_client(
    load: Load, url: str, model: str, tokenizer: str, logs: Path, name: str, may_fail: bool = False
) -> Served:
    """Runs the client in a process of its own; its log and its raw result go to logs/client-NAME.{log,json}.

    Raises EpError, with the log's path, when the client fails or, unless may_fail, a request does.
    """
    log, result = logs / f"client-{name}.log", logs / f"client-{name}.json"
    flags: dict[str, Any] = {
        "backend": "vllm",
        "base-url": url,
        "model": model,
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": load.input_len,
        "random-output-len": load.output_len,
        "num-prompts": load.num_prompts,
        "num-warmups": load.concurrency,
        "max-concurrency": load.concurrency,
        "seed": load.seed,
        "temperature": 0,
        "percentile-metrics": ",".join(_LATENCIES),
        "metric-percentiles": ",".join(map(str, _PERCENTILES)),
        "result-dir": logs,
        "result-filename": result.name,
    }
    command = [sys.executable, "-m", "ep.bench.vllm_client", "--save-result", "--ignore-eos", "--disable-tqdm"]
    command += [f"--{key}={value}" for key, value in flags.items()]
    with log.open("wb") as out:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0 or not result.is_file():
        raise EpError(f"{log}: vLLM's benchmark client ended with exit code {done.returncode}")
    raw: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if raw["completed"] != load.num_prompts and not may_fail:
        raise EpError(f"{log}: {url} answered {raw['completed']} of {load.num_prompts} requests")
    ttft, tpot, itl = (Percentiles(*(raw[f"p{p}_{name}_ms"] for p in _PERCENTILES)) for name in _LATENCIES)
    return Served(raw["duration"], raw["output_throughput"], ttft, tpot, itl, load.num_prompts - raw["completed"])
