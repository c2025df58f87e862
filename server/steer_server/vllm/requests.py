"""vLLM's requests: without what ordinary clients send to ask for nothing, and whose words they
hold.

vLLM refuses some of what asks for nothing: null where it has a default, an empty stop string, an
empty list of tools. The transformers engine's server accepts the same
(`steer_server.generation.neutral_values`).

Whose words a chat's tokens are is seen in vLLM's own rendering: of the chat as it is, and once more
with marks around what each message says, with the template, tools and variables of the request,
whatever these are. Only requests whose steering names roles pay for that.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from anyio import to_thread
from fastapi import Request
from pydantic import model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from steer.engines.checks import no_messages
from steer.errors import SpecError, Unsupported
from steer.prompts.roles import MarkedChat, RoleRanges, contents, role_ranges
from steer_server.generation.neutral_values import without_nulls
from steer_server.generation.request_models import AddedFields

FindRoles = Callable[[str, Any, Request], Awaitable[RoleRanges | None]]
"""Of one of vLLM's requests, with the pointer at which its steering names roles; None where vLLM
has something to refuse about it, which its own route says."""


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


async def roles_of_chat(at: str, request: Any, raw_request: Request) -> RoleRanges | None:
    """Where in the prompt of a chat each message lies.

    Raises `Unsupported` (`roles_unsupported`) where the rendering does not show that.
    """
    state = raw_request.app.state
    render = state.openai_serving_chat.online_renderer.render_chat
    # What a request holds is changed by rendering it, and parts of it can be read but once.
    body = json.loads(await raw_request.body())
    body = {name: value for name, value in body.items() if name not in AddedFields.model_fields}
    kind = type(request)
    plain = await _rendered(render, kind.model_validate(body))
    if plain is None:
        return None
    tokenizer = state.steer.engine.tokenizer
    ids, text = await to_thread.run_sync(_read, tokenizer, plain)
    messages = body["messages"]
    try:
        chat = MarkedChat.of(messages, avoiding=text + contents(messages))
        other = await _rendered(render, kind.model_validate({**body, "messages": chat.messages}))
        if other is None:
            raise Unsupported(
                "the model's chat template refuses these messages with marks around what they say: "
                "select by 'positions', 'between' or 'after' in place of 'roles'",
                code="roles_unsupported",
            )
        marked = (await to_thread.run_sync(_read, tokenizer, other))[1]
        return await to_thread.run_sync(role_ranges, tokenizer, ids, text, chat, marked)
    except Unsupported as error:
        raise error.at(at) from None


async def refuse_text(at: str, request: Any, raw_request: Request) -> RoleRanges | None:  # noqa: ARG001
    """A completion's prompt has no messages."""
    raise no_messages(param=at)


async def refuse_responses(
    at: str,
    request: Any,  # noqa: ARG001
    raw_request: Request,  # noqa: ARG001
) -> RoleRanges | None:
    """What vLLM makes of a response's input is not looked into."""
    raise SpecError(
        "'roles' are found in the messages of /v1/chat/completions alone: send the conversation "
        "there, or select by 'positions', 'between' or 'after'",
        param=at,
        code="no_messages",
    )


async def _rendered(render: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
    """vLLM's input to the engine; None where it refuses the request."""
    try:
        found = await render(request)
    except Exception:  # its own route meets the same, and answers it
        return None
    inputs: Any = found[1] if isinstance(found, tuple) else ()
    return inputs[0] if len(inputs) == 1 else None


def _read(tokenizer: Any, rendered: Any) -> tuple[list[int], str]:
    """The tokens of a rendered chat, and the text that they stand for."""
    ids = list(rendered["prompt_token_ids"])
    text = rendered.get("prompt")
    if not isinstance(text, str):
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
    return ids, text
