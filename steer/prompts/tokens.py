"""Text and chats to tokens, and generated tokens to text.

The rule for special tokens, which every engine, plan, fit and inspection keeps: a text that is a
whole prompt gets those that the tokenizer puts around a sequence (`text_tokens`). A chat gets none
beside those that its template writes, and text that stands within a sequence or goes on from one (a
trigger, a response, an answer) gets none at all (`part_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.errors import SteerError
from steer.prompts.forms import Marked, Messages, Prompt


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """`text` as a whole prompt, with the tokenizer's own special tokens."""
    return list(tokenizer.encode(text))


def part_tokens(tokenizer: Any, text: str) -> list[int]:
    """`text` as a part of a sequence: no special token but those that it spells out."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how its model's chats are written."""
    return getattr(tokenizer, "chat_template", None) is not None


def chat_text(
    tokenizer: Any, messages: Messages, *, open_answer: bool, param: str | None = None
) -> str:
    """`messages` as the model's own chat template writes them, with the opening of an answer where
    `open_answer` says so.

    Raises `SteerError` (`invalid_messages`) at `param` where the template refuses them.
    """
    # Chat templates know OpenAI's newer name for system messages only by its older one.
    turns = [
        {**turn, "role": "system" if turn["role"] == "developer" else turn["role"]}
        for turn in messages
    ]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=open_answer
        )
    except Exception as error:
        # Templates are programs that come with the model; whatever they raise is about the chat.
        raise SteerError(
            f"the model's chat template refuses these messages: {error}",
            param=param,
            code="invalid_messages",
        ) from error
    return text


def chat_tokens(
    tokenizer: Any, messages: Messages, *, open_answer: bool, param: str | None = None
) -> list[int]:
    """The tokens of `chat_text`."""
    text = chat_text(tokenizer, messages, open_answer=open_answer, param=param)
    return part_tokens(tokenizer, text)


def render(tokenizer: Any, prompt: Prompt) -> list[int]:
    """`prompt` as tokens, with its response where it has one.

    Messages go through the chat template, with the opening of an answer unless the last message is
    the assistant's. Raises `SteerError` where there is no template (`no_chat_template`) or it
    refuses them (`invalid_messages`).
    """
    if isinstance(prompt, Marked):
        asked = render(tokenizer, prompt.prompt)
        return asked + part_tokens(tokenizer, prompt.response) if prompt.response else asked
    if isinstance(prompt, str):
        return text_tokens(tokenizer, prompt)
    if not has_chat_template(tokenizer):
        raise SteerError(
            "the model's tokenizer has no chat template: give prompts as plain texts",
            code="no_chat_template",
        )
    return chat_tokens(tokenizer, prompt, open_answer=prompt[-1]["role"] != "assistant")


def answer_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Generated `tokens` as text, without special tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
