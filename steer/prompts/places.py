"""A prompt as a model reads it, and where in its tokens a piece of its text lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from steer.errors import SpecError, SteerError, pointer
from steer.model import ModelInfo
from steer.prompts.chat import ChatForm, check_variables, read_chat
from steer.prompts.forms import Messages, Place, PromptInput
from steer.prompts.labels import token_texts
from steer.prompts.length import check_text_length
from steer.prompts.roles import RoleRanges, chat_roles
from steer.prompts.spans import Span, token_spans, tokens_within
from steer.prompts.tokens import text_tokens


class PromptReader(Protocol):
    """Whose tokens a prompt becomes: an engine, as far as prompts know one."""

    info: ModelInfo
    tokenizer: Any


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it. `text` is None where only ids are known."""

    ids: tuple[int, ...]
    text: str | None
    tokenizer: Any
    chat: tuple[Messages, ChatForm] | None = None
    """The messages that it was written from, and how."""

    @cached_property
    def roles(self) -> RoleRanges | None:
        """Whose words its tokens are; None where it was not given as messages. Raises `SteerError`
        (`roles_unsupported`) where the template does not show that."""
        if self.chat is None:
            return None
        messages, form = self.chat
        return chat_roles(self.tokenizer, messages, form, ids=self.ids)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text of each token by itself."""
        return token_texts(self.tokenizer, self.ids)

    def position(self, place: Place, *, param: str) -> int:
        """The absolute position of `place`; raises `SpecError` at `param` where there is none."""
        if isinstance(place, str):
            return self.tokens_of(self._last(place, param), param)[-1]
        if not -len(self.ids) <= place < len(self.ids):
            raise SpecError(
                f"position {place} is outside the prompt, which has {len(self.ids)} tokens: use "
                f"{-len(self.ids)} to {len(self.ids) - 1}",
                param=param,
                code="position_out_of_range",
            )
        return place % len(self.ids)

    def positions_of(self, part: str, *, param: str) -> list[int]:
        """The positions of all tokens of the last `part` of the text; raises `SpecError` at
        `param` where there is none."""
        return self.tokens_of(self._last(part, param), param)

    def last_token_of(self, part: str) -> int | None:
        """The position of the last token of the last `part` of the text; None without one."""
        text, spans = self._read
        start = text.rfind(part)
        hits = [] if start < 0 else tokens_within(spans, (start, start + len(part)))
        return hits[-1] if hits else None

    def placeholder(self, text: str, *, param: str) -> int:
        """The position of the last token that is `text` and nothing else but white space."""
        self._last(text, param)
        wanted = self._text(param)
        start = wanted.rfind(text)
        found = self.tokens_of((start, start + len(text)), param)
        while start >= 0:
            places = self.tokens_of((start, start + len(text)), param)
            if len(places) == 1 and self.tokens[places[0]].strip() == text.strip():
                return places[0]
            start = wanted.rfind(text, 0, start + len(text) - 1)
        pieces = [self.tokens[place] for place in found]
        raise SpecError(
            f"the placeholder {text!r} is not one token here (it lies in {pieces}): choose one "
            "that is a single token of this model, set it off with spaces, or give 'position'",
            param=param,
            code="not_one_token",
        )

    def tokens_of(self, span: Span, param: str) -> list[int]:
        """The positions of the tokens that share characters with `span` of the text."""
        start, end = span
        hits = tokens_within(self._read[1], span)
        if not hits:
            raise SpecError(
                f"no token covers {self._text(param)[start:end]!r} in the prompt: give its "
                "position as a number",
                param=param,
                code="text_not_found",
            )
        return hits

    def _last(self, part: str, param: str) -> Span:
        start = self._text(param).rfind(part)
        if start < 0:
            raise SpecError(
                f"{part!r} does not occur in the prompt: give text that does, or a position",
                param=param,
                code="text_not_found",
            )
        return start, start + len(part)

    def _text(self, param: str) -> str:
        if self.text is None:
            raise SpecError(
                "a prompt of token ids has no text to search: give positions as numbers",
                param=param,
                code="text_not_found",
            )
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[str, list[Span]]:
        """The text as it is searched, and each token's characters in it."""
        if self.text is None:
            return "", [(0, 0)] * len(self.ids)
        return token_spans(self.tokenizer, self.ids, self.text)


def encode_prompt(reader: PromptReader, given: PromptInput, *, at: str = "") -> EncodedPrompt:
    """`given` as tokens of the reader's model; `at` is its JSON pointer in the request.

    Raises `SteerError` for messages that the chat template refuses, variables that it does not
    read, ids outside the vocabulary and prompts longer than the context.
    """
    tokenizer, info, text, chat = reader.tokenizer, reader.info, given.text, None
    if given.tokens is not None:
        _check_ids(given.tokens, info.vocab_size, at)
        ids = given.tokens
    elif text is not None:
        check_text_length(tokenizer, text, info.max_length, param=at + "/text")
        ids = tuple(text_tokens(tokenizer, text))
    else:
        turns = [turn.model_dump() for turn in given.messages or ()]
        variables = given.chat_template_kwargs or {}
        check_variables(tokenizer, variables, param=at + "/chat_template_kwargs")
        check_text_length(tokenizer, turns, info.max_length, param=at + "/messages")
        form = ChatForm(open_answer=given.add_generation_prompt, variables=variables)
        read, text = read_chat(tokenizer, turns, form, param=at + "/messages")
        ids, chat = tuple(read), (turns, form)
    field = next(
        name for name in ("text", "messages", "tokens") if getattr(given, name) is not None
    )
    if not 0 < len(ids) <= info.max_length:
        raise SteerError(
            f"the prompt has {len(ids)} tokens; {info.name!r} takes 1 to {info.max_length}",
            param=at + pointer(field),
            code="context_length_exceeded" if ids else "empty_prompt",
        )
    return EncodedPrompt(ids, text, tokenizer, chat)


def _check_ids(ids: Sequence[int], vocab_size: int, at: str) -> None:
    for place, token in enumerate(ids):
        if token >= vocab_size:
            raise SpecError(
                f"there is no token {token}: the vocabulary has {vocab_size}",
                param=at + pointer("tokens", place),
                code="token_out_of_range",
            )
