"""From what a caller sends (text, messages or ids) to tokens, and to places among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import jinja2
from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.engines.base import Engine
from steer.errors import SpecError, SteerError, pointer
from steer.spec import Index

_BROKEN = "\ufffd"

Place = Annotated[int, Field(strict=True)] | Annotated[str, Field(min_length=1, max_length=4096)]
"""A token position (negative from the end), or a piece of the prompt's text: then the last token
of its last occurrence, where a subject's information gathers."""


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class PromptInput(BaseModel):
    """A prompt, in exactly one of three forms.

    `text` is encoded as it stands, with the tokenizer's own special tokens; `messages` go through
    the model's chat template; `tokens` are ids.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Annotated[str, Field(min_length=1, max_length=1 << 20)] | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=4096)] | None = None
    tokens: Annotated[tuple[Index, ...], Field(min_length=1, max_length=1 << 20)] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_form(self) -> PromptInput:
        given = [name for name in ("text", "messages", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "a prompt is given as exactly one of 'text', 'messages' and 'tokens'; "
                f"got {' and '.join(given) or 'none of them'}"
            )
        return self


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it. `text` is None where only ids are known.

    `special` says whether the tokenizer put its own special tokens around `text`.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    text: str | None
    special: bool
    tokenizer: Any

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

    def tokens_of(self, span: tuple[int, int], param: str) -> list[int]:
        """The positions of the tokens that share characters with `span` of the text."""
        start, end = span
        hits = [n for n, (a, b) in enumerate(self._spans) if a < end and b > start]
        if not hits:
            raise SpecError(
                f"no token covers {self._text(param)[start:end]!r} in the prompt: give its "
                "position as a number",
                param=param,
                code="text_not_found",
            )
        return hits

    def _last(self, part: str, param: str) -> tuple[int, int]:
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
        return self.text

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """Each token's characters in `text`, half-open; empty for added special tokens."""
        if self.text is None:
            return [(0, 0)] * len(self.ids)
        if getattr(self.tokenizer, "is_fast", False):
            found = self.tokenizer(
                self.text, add_special_tokens=self.special, return_offsets_mapping=True
            )
            return [(int(a), int(b)) for a, b in found["offset_mapping"]]
        return self._spans_by_prefix(self.text)

    def _spans_by_prefix(self, text: str) -> list[tuple[int, int]]:
        """For tokenizers without offsets: a prefix of the tokens decodes to a prefix of the text,
        where a broken character stands for the one that later tokens complete."""
        decoded = [
            self.tokenizer.decode(self.ids[: n + 1], skip_special_tokens=False)
            for n in range(len(self.ids))
        ]
        before = len(decoded[-1]) - len(text)
        starts = [0, *(len(part) - part.endswith(_BROKEN) for part in decoded[:-1])]
        return [
            (max(start - before, 0), max(len(part) - before, 0))
            for start, part in zip(starts, decoded, strict=True)
        ]


def encode_prompt(engine: Engine, given: PromptInput, *, at: str = "") -> EncodedPrompt:
    """`given` as tokens of the engine's model; `at` is its JSON pointer in the request.

    Raises `SteerError` for messages that the chat template refuses, ids outside the vocabulary and
    prompts longer than the context.
    """
    tokenizer = engine.tokenizer
    text, special = given.text, True
    if given.tokens is not None:
        _check_ids(given.tokens, engine.info.vocab_size, at)
        ids = given.tokens
    else:
        if given.messages is not None:
            text, special = _rendered(tokenizer, given, at), False
        ids = tuple(tokenizer.encode(text, add_special_tokens=special))
    form = next(name for name in ("text", "messages", "tokens") if getattr(given, name) is not None)
    if not 0 < len(ids) <= engine.info.max_length:
        raise SteerError(
            f"the prompt has {len(ids)} tokens; {engine.info.name!r} takes 1 to "
            f"{engine.info.max_length}",
            param=at + pointer(form),
            code="context_length_exceeded" if ids else "empty_prompt",
        )
    return EncodedPrompt(ids, token_texts(tokenizer, ids), text, special, tokenizer)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token by itself; a part of a character is given in the tokenizer's own
    notation."""
    texts = []
    for token in ids:
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        if _BROKEN in text:
            text = str(tokenizer.convert_ids_to_tokens([token])[0])
        texts.append(text)
    return tuple(texts)


def _rendered(tokenizer: Any, given: PromptInput, at: str) -> str:
    messages = [
        {"role": "system" if turn.role == "developer" else turn.role, "content": turn.content}
        for turn in given.messages or ()
    ]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=given.add_generation_prompt
        )
    except (jinja2.TemplateError, ValueError) as error:
        raise SteerError(
            f"the model's chat template refuses these messages: {error}",
            param=at + "/messages",
            code="invalid_messages",
        ) from error
    return text


def _check_ids(ids: Sequence[int], vocab_size: int, at: str) -> None:
    for place, token in enumerate(ids):
        if token >= vocab_size:
            raise SpecError(
                f"there is no token {token}: the vocabulary has {vocab_size}",
                param=at + pointer("tokens", place),
                code="token_out_of_range",
            )
