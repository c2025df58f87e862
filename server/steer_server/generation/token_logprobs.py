"""Log-probabilities of generated tokens, in the newer of OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from steer.engines.base import TokenLogprob
from steer.prompts import openai_token


def token_logprobs(tokenizer: Any, logprobs: Iterable[tuple[int, TokenLogprob]]) -> ChoiceLogprobs:
    """Every token with its bytes and the best alternatives at its place."""
    content = []
    for token, found in logprobs:
        top = [
            TopLogprob(token=text, bytes=raw, logprob=value)
            for other, value in found.top
            for text, raw in [openai_token(tokenizer, other)]
        ]
        text, raw = openai_token(tokenizer, token)
        content.append(
            ChatCompletionTokenLogprob(
                token=text, bytes=raw, logprob=found.logprob, top_logprobs=top
            )
        )
    return ChoiceLogprobs(content=content, refusal=None)
