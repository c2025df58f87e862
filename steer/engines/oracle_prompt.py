"""The prompt in which an oracle is asked: the question, and places for states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from steer.artefacts.oracle_form import OracleForm
from steer.errors import SpecError
from steer.prompts import PromptInput, PromptReader, as_chat, encode_prompt, inner_tokens

_FIELD = re.compile(r"\{(layer|states|question)\}")


@dataclass(frozen=True)
class OraclePrompt:
    """Tokens, and for each state the absolute positions where it stands."""

    ids: tuple[int, ...]
    places: tuple[tuple[int, ...], ...] = ()


def oracle_prompt(
    engine: PromptReader,
    form: OracleForm,
    question: str,
    *,
    layer: int,
    states: int,
    whole: bool = False,
    at: str | None = None,
) -> OraclePrompt:
    """The prompt with room for `states` states that were read at `layer`.

    A state stands at the last token of each of its placeholders; with `whole`, as adapters are
    trained, a placeholder has to be one token. Raises `SpecError` with the pointer `at`:
    `placeholder_not_one_token`, or `ambiguous_placeholder` where the placeholders are not found
    as often as they should be, as when the question holds one too.
    """
    piece = inner_tokens(engine.tokenizer, form.placeholder)
    if whole and len(piece) != 1:
        raise SpecError(
            f"the placeholder {form.placeholder!r} is {len(piece)} tokens of this model, and an "
            "oracle's is one: give a form whose placeholder is one, or an oracle of this model",
            code="placeholder_not_one_token",
            param=at,
        )
    count = states * form.repeat
    ids = _encoded(engine, form, question, layer, form.placeholder * count)
    ends = _ends(ids, piece)
    if len(ends) != count:
        raise SpecError(
            f"the placeholder {form.placeholder!r} should stand {count} times in the prompt, and "
            f"stands {len(ends)} times: leave it out of the question, or give a form with another",
            code="ambiguous_placeholder",
            param=at,
        )
    places = tuple(tuple(ends[n : n + form.repeat]) for n in range(0, count, form.repeat))
    return OraclePrompt(ids, places)


def oracle_text_prompt(
    engine: PromptReader, form: OracleForm, question: str, *, layer: int, text: str
) -> OraclePrompt:
    """The same prompt with a text in place of the placeholders, and no state."""
    if form.placeholder.startswith(" ") and text:
        text = " " + text.lstrip()
    return OraclePrompt(_encoded(engine, form, question, layer, text))


def _encoded(
    engine: PromptReader, form: OracleForm, question: str, layer: int, states: str
) -> tuple[int, ...]:
    """One turn of a chat, without thinking, where the model knows chats; and the opening."""
    said = {"layer": str(layer), "states": states, "question": question}

    def filled(text: str) -> str:
        return _FIELD.sub(lambda match: said[match[1]], text)

    asked = as_chat(engine.tokenizer, filled(form.message))
    if isinstance(asked, str):
        prompt = PromptInput(text=asked)
    else:
        template = str(getattr(engine.tokenizer, "chat_template", None))
        thinks = {"enable_thinking": False} if "enable_thinking" in template else None
        prompt = PromptInput.model_validate({"messages": asked, "chat_template_kwargs": thinks})
    ids = encode_prompt(engine, prompt).ids
    opening = filled(form.opening)
    return (*ids, *inner_tokens(engine.tokenizer, opening)) if opening else ids


def _ends(ids: Sequence[int], piece: Sequence[int]) -> list[int]:
    """Where each `piece` in `ids` ends, from the left, without overlaps."""
    found, start = [], 0
    while start + len(piece) <= len(ids):
        if list(ids[start : start + len(piece)]) == list(piece):
            start += len(piece)
            found.append(start - 1)
        else:
            start += 1
    return found
