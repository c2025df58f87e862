"""Prompts as clients send them with a job: texts, or lists of chat messages."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from steer.fit.data.pairs import Prompt


class MessageParam(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str


PromptParam: TypeAlias = (
    Annotated[str, Field(min_length=1)] | Annotated[tuple[MessageParam, ...], Field(min_length=1)]
)


def prompt_of(param: PromptParam) -> Prompt:
    """The prompt as fitting takes it."""
    if isinstance(param, str):
        return param
    return [message.model_dump() for message in param]
