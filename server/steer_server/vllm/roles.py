"""Whose words the tokens of a chat are, by vLLM's own rendering of it.

vLLM renders the chat as it is, and once more with marks around what each message says: with the
template, tools and variables of the request, whatever these are. Only requests whose steering names
roles pay for that.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from anyio import to_thread
from fastapi import Request

from steer.engines.checks import no_messages
from steer.errors import SpecError, Unsupported
from steer.prompts.roles import MarkedChat, RoleSpans, contents, role_spans
from steer_server.generation.request_models import AddedFields

FindRoles = Callable[[str, Any, Request], Awaitable[RoleSpans | None]]
"""Of one of vLLM's requests, with the pointer at which its steering names roles; None where vLLM
has something to refuse about it, which its own route says."""


async def roles_of_chat(at: str, request: Any, raw_request: Request) -> RoleSpans | None:
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
        return await to_thread.run_sync(role_spans, tokenizer, ids, text, chat, marked)
    except Unsupported as error:
        raise error.at(at) from None


async def refuse_text(at: str, request: Any, raw_request: Request) -> RoleSpans | None:  # noqa: ARG001
    """A completion's prompt has no messages."""
    raise no_messages(param=at)


async def refuse_responses(
    at: str,
    request: Any,  # noqa: ARG001
    raw_request: Request,  # noqa: ARG001
) -> RoleSpans | None:
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
    inputs = found[1] if isinstance(found, tuple) else ()
    return inputs[0] if len(inputs) == 1 else None


def _read(tokenizer: Any, rendered: Any) -> tuple[list[int], str]:
    """The tokens of a rendered chat, and the text that they stand for."""
    ids = list(rendered["prompt_token_ids"])
    text = rendered.get("prompt")
    if not isinstance(text, str):
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
    return ids, text
