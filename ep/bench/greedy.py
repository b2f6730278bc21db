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
    prompts = StreamLoad(num_prompts, 1, _PROMPT_LEN, ANSWER_LEN, seed).prompts()
    extra = {"ignore_eos": True, "return_token_ids": True}
    found = []
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=_REQUEST_S) as client:
        for prompt in prompts:
            try:
                answer = client.completions.create(
                    model=model, prompt=prompt, max_tokens=ANSWER_LEN, temperature=0, extra_body=extra
                )
            except OpenAIError as error:
                raise EpError(str(error)) from error
            found.append(list((answer.choices[0].model_extra or {})["token_ids"]))
    return found
