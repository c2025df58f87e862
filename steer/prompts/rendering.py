"""Prompts of data files as tokens, and where in them the answer and the subject lie.

The answer's tokens are those of what the assistant said, as the model reads it: where the template
strips or trims a content, what is left; without the template's marks around it, and without
thoughts, be they the template's empty ones or the content's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer.errors import SteerError
from steer.prompts.chat import (
    OPEN,
    THOUGHT_ENDS,
    answered_form,
    chat_tokens,
    read_chat,
    template_source,
)
from steer.prompts.forms import Marked, Messages, Prompt
from steer.prompts.places import EncodedPrompt
from steer.prompts.roles import RoleRanges, chat_roles
from steer.prompts.spans import Span, shared_length, token_spans, tokens_within
from steer.prompts.tokens import part_tokens, text_tokens


def render(tokenizer: Any, prompt: Prompt) -> list[int]:
    """`prompt` as tokens, with its response where it has one.

    Messages go through the chat template, with the opening of an answer unless the last message is
    the assistant's. Raises `SteerError` where there is no template (`no_chat_template`) or it
    refuses them (`invalid_messages`).
    """
    if isinstance(prompt, Marked):
        return _with_response(tokenizer, prompt)[0]
    if isinstance(prompt, str):
        return text_tokens(tokenizer, prompt)
    return chat_tokens(tokenizer, prompt, answered_form(tokenizer) if _answered(prompt) else OPEN)


def rendered_roles(tokenizer: Any, prompt: Prompt) -> RoleRanges | None:
    """Whose words the tokens of `render` are; None for a text. A response is the assistant's.

    Raises `SteerError` (`roles_unsupported`) where the template does not show it."""
    if isinstance(prompt, Marked):
        asked = rendered_roles(tokenizer, prompt.prompt)
        if asked is None or not prompt.response:
            return asked
        assert not isinstance(prompt.prompt, str)
        ids, said = _with_response(tokenizer, prompt)
        if ids[: asked.length] != render(tokenizer, prompt.prompt):
            # The response was written as a message, behind another opening.
            told = [*prompt.prompt, {"role": "assistant", "content": prompt.response}]
            asked = chat_roles(tokenizer, told, answered_form(tokenizer))
        ranges = [one for one in asked.ranges if one[1] <= said.start]
        if said:
            ranges.append((said.start, said.stop, "assistant"))
        return RoleRanges(len(ids), tuple(ranges))
    if isinstance(prompt, str):
        return None
    form = answered_form(tokenizer) if _answered(prompt) else OPEN
    return chat_roles(tokenizer, prompt, form)


def prompt_length(tokenizer: Any, prompt: Prompt) -> int:
    """How many of the tokens of `render` come before the answer, where there is one: what a model
    would have read before it said it."""
    answer = answer_range(tokenizer, prompt)
    return answer.start if answer else len(render(tokenizer, prompt))


def answer_range(tokenizer: Any, prompt: Prompt) -> range:
    """Where in what `render` gives the answer's tokens lie; empty where there is no answer."""
    if isinstance(prompt, Marked) and prompt.response:
        return _with_response(tokenizer, prompt)[1]
    messages = prompt.prompt if isinstance(prompt, Marked) else prompt
    if isinstance(messages, str) or not _answered(messages):
        return range(0)
    return _written(tokenizer, messages).answer


def encoded(tokenizer: Any, prompt: str | Messages) -> EncodedPrompt:
    """`prompt` in the tokens of `render`, with the text in which places are sought."""
    if isinstance(prompt, str):
        return EncodedPrompt(tuple(text_tokens(tokenizer, prompt)), prompt, tokenizer)
    form = answered_form(tokenizer) if _answered(prompt) else OPEN
    ids, text = read_chat(tokenizer, prompt, form)
    return EncodedPrompt(tuple(ids), text, tokenizer)


def _answered(messages: Messages) -> bool:
    return len(messages) > 0 and messages[-1]["role"] == "assistant"


def _with_response(tokenizer: Any, prompt: Marked) -> tuple[list[int], range]:
    """The tokens of a prompt with its response, and where the response's lie.

    The response goes on from the opening of an answer, unless the template writes answers behind
    another one (a thought that is open there, or an empty one here): then it is a message.
    """
    asked = render(tokenizer, prompt.prompt)
    if not prompt.response:
        return asked, range(0)
    said = part_tokens(tokenizer, prompt.response)
    start = len(asked) + _thoughts(tokenizer, prompt.response, said)
    if not isinstance(prompt.prompt, str) and start == len(asked) and not _answered(prompt.prompt):
        written = _written_response(tokenizer, prompt.prompt, prompt.response)
        if written is not None:
            return written.ids[: written.answer.stop], written.answer
    return asked + said, range(start, len(asked) + len(said))


@dataclass(frozen=True)
class _Written:
    """A chat that ends with an answer: its tokens, the answer's, and the text before those."""

    ids: list[int]
    answer: range
    before: str


def _written_response(tokenizer: Any, asked: Messages, response: str) -> _Written | None:
    """`response` as a message behind `asked`; None where that is no other text than the response
    behind the opening of an answer, or where the template cannot write it."""
    try:
        written = _written(tokenizer, [*asked, {"role": "assistant", "content": response}])
    except SteerError:
        return None
    _, opening = read_chat(tokenizer, asked)
    return written if written.answer and written.before != opening else None


def _written(tokenizer: Any, messages: Messages) -> _Written:
    """Finds the answer by writing the chat with another one in its place."""
    said = messages[-1]["content"]
    other = next(mark for mark in _marks() if mark not in said)
    ids, text, spans = _read(tokenizer, messages)
    _, beside, _ = _read(tokenizer, [*messages[:-1], {**messages[-1], "content": other}])
    start, end = _difference(text, beside)
    start += _thought_length(tokenizer, text[start:end])
    places = tokens_within(spans, (start, end))
    answer = range(places[0], places[-1] + 1) if places else range(0)
    return _Written(ids, answer, text[:start])


def _read(tokenizer: Any, messages: Messages) -> tuple[list[int], str, list[Span]]:
    """A chat that ends with an answer: its tokens, its text, and their characters in it."""
    ids, text = read_chat(tokenizer, messages, answered_form(tokenizer))
    return ids, *token_spans(tokenizer, ids, text)


def _marks() -> Sequence[str]:
    """Characters that are in no text: Unicode's private ones."""
    return [chr(code) for code in range(0xE000, 0xF900)]


def _difference(text: str, other: str) -> Span:
    """Where `text` differs from `other`: all between what they begin and end with in common."""
    start = shared_length(text, other)
    left = min(len(text), len(other)) - start
    return start, len(text) - min(shared_length(text[::-1], other[::-1]), left)


def _thought_length(tokenizer: Any, said: str) -> int:
    """How many characters of `said` are thoughts, in a way that the template knows."""
    source = template_source(tokenizer) or ""
    known = [mark for mark in THOUGHT_ENDS if mark in source and mark in said]
    if not known:
        return 0
    rest = said[max(said.rfind(mark) + len(mark) for mark in known) :]
    return len(said) - len(rest.lstrip())


def _thoughts(tokenizer: Any, response: str, said: list[int]) -> int:
    """How many of the tokens `said` of a response are thoughts."""
    length = _thought_length(tokenizer, response)
    if not length:
        return 0
    _, spans = token_spans(tokenizer, said, response)
    return tokens_within(spans, (length, len(response)))[0] if length < len(response) else len(said)
