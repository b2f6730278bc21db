"""The tokens of a few fixed prompts: whatever is changed about where a model runs, they stay."""

from __future__ import annotations

from openai import OpenAI, OpenAIError

from ep.bench.streams import StreamLoad
from ep.errors import EpError

NUM_PROMPTS, ANSWER_LEN = 8, 32
_PROMPT_LEN = 24
_REQUEST_S = 120.0


def greedy_tokens(url: str, model: str, seed: int, num_prompts: int = NUM_PROMPTS) -> list[list[int]]:
    """Token ids of the answers, one request at a time. Raises EpError with what the server says."""
    with greedy_client(url) as client:
        return [greedy_answer(client, model, prompt) for prompt in greedy_prompts(seed, num_prompts)]


def greedy_client(url: str) -> OpenAI:
    """For requests from any thread."""
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=_REQUEST_S)


def greedy_prompts(seed: int, num_prompts: int) -> list[list[int]]:
    """Token ids."""
    return StreamLoad(num_prompts, 1, _PROMPT_LEN, ANSWER_LEN, seed).prompts()


def greedy_answer(client: OpenAI, model: str, prompt: list[int]) -> list[int]:
    """Token ids of one answer. Raises EpError with what the server says."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    try:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=ANSWER_LEN, temperature=0, extra_body=extra
        )
    except OpenAIError as error:
        raise EpError(str(error)) from error
    return list((answer.choices[0].model_extra or {})["token_ids"])
