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
    render = raw_request.app.state.openai_serving_chat.online_renderer.render_chat
    body = await _own_fields(raw_request)
    return await _roles(
        at, request, raw_request, render, body["messages"], lambda told: {**body, "messages": told}
    )


async def roles_of_response(at: str, request: Any, raw_request: Request) -> RoleRanges | None:
    """Where in the prompt of a response its instructions and the messages of its input lie; what
    else is in the input belongs to nobody.

    Raises `Unsupported` (`roles_unsupported`) as for a chat, and `SpecError` (`no_messages`) for a
    response that goes on from a stored one, whose messages are not in the request.
    """
    serving = raw_request.app.state.openai_serving_responses
    render = getattr(getattr(serving, "online_renderer", None), "render_responses", None)
    body = await _own_fields(raw_request)
    if render is None or body.get("previous_response_id") is not None:
        raise SpecError(
            "'roles' are found in messages that come with the request: send the conversation "
            "whole, in 'input', or select by 'positions', 'between' or 'after'",
            param=at,
            code="no_messages",
        )
    told = body.get("instructions")
    asked = body["input"]
    items = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    # What is no message has no role, and nothing of it is marked.
    turns = [{"role": "system", "content": told}] if told else []
    turns += [one if "role" in one else {**one, "role": ""} for one in items]

    def changed(marked: list[dict[str, Any]]) -> dict[str, Any]:
        head, said = (marked[0], marked[1:]) if told else (None, marked)
        kept = [
            {name: value for name, value in one.items() if value != "" or name != "role"}
            for one in said
        ]
        found = {**body, "input": kept[0]["content"] if isinstance(asked, str) else kept}
        return found if head is None else {**found, "instructions": head["content"]}

    return await _roles(at, request, raw_request, render, turns, changed)


async def _own_fields(raw_request: Request) -> dict[str, Any]:
    """The request's body without the fields that are added to vLLM's. Rendering a request changes
    it, and parts of it can be read but once, so each is made anew of this."""
    body = json.loads(await raw_request.body())
    return {name: value for name, value in body.items() if name not in AddedFields.model_fields}


async def _roles(
    at: str,
    request: Any,
    raw_request: Request,
    render: Callable[[Any], Awaitable[Any]],
    messages: list[dict[str, Any]],
    changed: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> RoleRanges | None:
    """Where in a rendered request its `messages` lie; `changed` is its body with others."""
    kind = type(request)
    if getattr(request, "truncate_prompt_tokens", None) is not None:
        raise Unsupported(
            "'truncate_prompt_tokens' cuts the prompt after the chat template has written it, so "
            "that nobody knows whose words are left: leave it out, or select by 'positions' in "
            "place of 'roles'",
            param=at,
            code="roles_unsupported",
        )
    plain = await _rendered(render, kind.model_validate(await _own_fields(raw_request)))
    if plain is None:
        return None
    tokenizer = raw_request.app.state.steer.engine.tokenizer
    ids, text = await to_thread.run_sync(_read, tokenizer, plain)
    try:
        chat = MarkedChat.of(messages, avoiding=text + contents(messages))
        other = await _rendered(render, kind.model_validate(changed(chat.messages)))
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


async def _rendered(render: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
    """vLLM's input to the engine; None where it refuses the request."""
    try:
        found = await render(request)
    except Exception:  # its own route meets the same, and answers it
        return None
    if isinstance(found, tuple):
        return found[1][0] if len(found[1]) == 1 else None
    return getattr(found, "engine_input", None)


def _read(tokenizer: Any, rendered: Any) -> tuple[list[int], str]:
    """The tokens of a rendered chat, and the text that they stand for."""
    ids = list(rendered["prompt_token_ids"])
    text = rendered.get("prompt")
    if not isinstance(text, str):
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
    return ids, text
