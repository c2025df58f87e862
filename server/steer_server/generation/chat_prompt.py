"""The messages of a chat request as the model's tokens, with the fields that shape them.

The fields are those of vLLM's server, under its names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.errors import SpecError, Unsupported
from steer.prompts import ChatForm, chat_tokens, check_text_length, part_tokens, text_tokens
from steer.prompts.chat import check_variables, read_chat, template_variables, variables_told
from steer.prompts.roles import RoleRanges, chat_roles
from steer_server.generation.request_models import ChatRequest
from steer_server.state import Serving


def chat_prompt(serving: Serving, body: ChatRequest) -> list[int]:
    """The conversation in the model's own chat template, as tokens.

    Raises `SteerError` for messages that the template refuses, and `Unsupported` for what it would
    pass over in silence.
    """
    tokenizer = serving.engine.tokenizer
    turns = [turn.model_dump() for turn in body.messages]
    check_text_length(tokenizer, turns, serving.engine.info.max_length, param="/messages")
    form = _form(tokenizer, body)
    if not body.add_special_tokens:
        return chat_tokens(tokenizer, turns, form, param="/messages")
    ids, text = read_chat(tokenizer, turns, form, param="/messages")
    if part_tokens(tokenizer, text) != ids:
        raise Unsupported(
            "this model's tokenizer writes the special tokens of a chat itself: leave "
            "'add_special_tokens' out",
            param="/add_special_tokens",
            code="unsupported_parameter",
        )
    return text_tokens(tokenizer, text)


def chat_prompt_roles(serving: Serving, body: ChatRequest, prompt: Sequence[int]) -> RoleRanges:
    """Whose words the tokens of `prompt`, as `chat_prompt` made them, are.

    Raises `Unsupported` (`roles_unsupported`) where the template does not show that.
    """
    tokenizer = serving.engine.tokenizer
    turns = [turn.model_dump() for turn in body.messages]
    return chat_roles(tokenizer, turns, _form(tokenizer, body), ids=prompt, param="/messages")


def _form(tokenizer: Any, body: ChatRequest) -> ChatForm:
    if body.continue_final_message and body.add_generation_prompt:
        raise SpecError(
            "'continue_final_message' goes on with the last message and 'add_generation_prompt' "
            "opens another one: set one of them",
            param="/continue_final_message",
            code="invalid_request",
        )
    opened = body.add_generation_prompt
    return ChatForm(
        open_answer=not body.continue_final_message if opened is None else opened,
        continue_final=body.continue_final_message,
        variables=_variables(tokenizer, body),
    )


def _variables(tokenizer: Any, body: ChatRequest) -> dict[str, Any]:
    """The template's variables: those of `chat_template_kwargs`, and what `reasoning_effort` sets.

    As on vLLM's server the effort is the variable of its name, and switches `enable_thinking`
    unless that is given.
    """
    given = dict(body.chat_template_kwargs or {})
    check_variables(tokenizer, given, param="/chat_template_kwargs")
    effort = body.reasoning_effort
    if effort is None:
        return given
    if given.get("reasoning_effort", effort) != effort:
        raise SpecError(
            "'reasoning_effort' and the one in 'chat_template_kwargs' disagree: give one of them",
            param="/reasoning_effort",
            code="invalid_request",
        )
    known = template_variables(tokenizer)
    asked = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    heard = {name: value for name, value in asked.items() if name in known}
    if not heard:
        raise Unsupported(
            "'reasoning_effort' would change nothing: the model's chat template reads "
            f"{variables_told(known)}; leave it out, or set a variable that it reads in "
            "'chat_template_kwargs'",
            param="/reasoning_effort",
            code="unsupported_parameter",
        )
    return {**heard, **given}
