"""Streamed completions side by side, and when each of their tokens came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from openai import AsyncOpenAI


@dataclass(frozen=True)
class Stream:
    """One completion: its text, when it was asked for, and when each piece came (time.monotonic). error: "" if none."""

    text: str
    asked: float
    came: tuple[float, ...]
    error: str = ""


@dataclass(frozen=True)
class StreamLoad:
    """Every prompt once, concurrency of them at a time, greedy, output_len tokens each."""

    num_prompts: int
    concurrency: int
    input_len: int
    output_len: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        """Token ids; the lowest are special ones."""
        pick = random.Random(self.seed)
        return [[pick.randrange(16, 256) for _ in range(self.input_len)] for _ in range(self.num_prompts)]


def run_streams(load: StreamLoad, url: str, model: str) -> list[Stream]:
    """In the order of the prompts. A request that fails is a Stream with an error."""
    return asyncio.run(_run(load, url, model))


def gaps_ms(streams: Sequence[Stream], start: float = 0.0, end: float = float("inf")) -> npt.NDArray[np.float64]:
    """Milliseconds between two pieces of a stream, of gaps that touch [start, end]."""
    found = [
        1e3 * (later - earlier)
        for stream in streams
        for earlier, later in zip(stream.came, stream.came[1:])
        if later >= start and earlier <= end
    ]
    return np.array(found)


def tokens_per_s(streams: Sequence[Stream]) -> float:
    """Pieces by the time from the first request to the last piece."""
    return sum(len(s.came) for s in streams) / (max(s.came[-1] for s in streams) - min(s.asked for s in streams))


async def _run(load: StreamLoad, url: str, model: str) -> list[Stream]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    room = asyncio.Semaphore(load.concurrency)

    async def one(prompt: list[int]) -> Stream:
        async with room:
            asked, text, came = time.monotonic(), [], []
            try:
                stream = await client.completions.create(
                    model=model,
                    prompt=prompt,
                    max_tokens=load.output_len,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                async for part in stream:
                    came.append(time.monotonic())
                    text += [choice.text for choice in part.choices]
            except Exception as error:  # whatever it was, the request failed, and that is what is counted
                return Stream("".join(text), asked, tuple(came), f"{type(error).__name__}: {error}")
            return Stream("".join(text), asked, tuple(came))

    async with client:
        return list(await asyncio.gather(*map(one, load.prompts())))
