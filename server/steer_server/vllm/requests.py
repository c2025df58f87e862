"""vLLM's requests, without what ordinary clients send to ask for nothing.

vLLM refuses some of it: null where it has a default, an empty stop string, an empty list of tools.
The transformers engine's server accepts the same (`steer_server.generation.neutral_values`).
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from steer_server.generation.neutral_values import without_nulls


class PlainChatRequest(ChatCompletionRequest):  # type: ignore[misc]
    """vLLM's chat request."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = _without_neutral(data)
        if kept.get("tools") == []:
            del kept["tools"]
        if "tools" not in kept and kept.get("tool_choice") in ("none", "auto"):
            del kept["tool_choice"]
        return kept


class PlainCompletionRequest(CompletionRequest):  # type: ignore[misc]
    """vLLM's completion request."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return _without_neutral(data) if isinstance(data, dict) else data


class PlainResponsesRequest(ResponsesRequest):  # type: ignore[misc]
    """vLLM's request for a response."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return _without_neutral(data) if isinstance(data, dict) else data


def _without_neutral(data: dict[str, Any]) -> dict[str, Any]:
    kept = without_nulls(data)
    if kept.get("stop") == "":
        del kept["stop"]
    return kept
