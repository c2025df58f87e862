"""The tokens that end an answer.

A model's files name them in several places, which do not always agree: its generation config, its
config, its tokenizer, and the template, which writes one behind every answer that the model was
trained on. All of them count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steer.errors import SteerError
from steer.prompts.chat import CLOSED, read_chat, template_source
from steer.prompts.tokens import part_tokens

_MARK = "\ue000"
"""A character of no text, as an answer."""


def end_tokens(
    tokenizer: Any, *, declared: Iterable[Any] = (), supposed: Iterable[Any] = ()
) -> frozenset[int]:
    """The ids that end an answer, all sources together.

    `declared` are the values of `eos_token_id` (an id, several, or None) that the model was given
    for generation. Those that are `supposed`, its config's, may be its class's default, which is
    any token of another vocabulary: they count where nothing is declared, or where the tokenizer
    has them as special tokens.
    """
    found = _ids(declared)
    if tokenizer is None:
        return found or _ids(supposed)
    special = special_tokens(tokenizer)
    found |= {id for id in _ids(supposed) if not found or id in special}
    found |= _ids([getattr(tokenizer, "eos_token_id", None)])
    end = turn_end(tokenizer)
    return found if end is None else found | {end}


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right behind an answer; None without one.

    Proven by writing a chat: the first token behind the answer, white space aside, is one special
    token. Where none is written there, as where the next turn's mark ends the answer, none is
    guessed.
    """
    if template_source(tokenizer) is None:
        return None
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        _, text = read_chat(tokenizer, chat, CLOSED)
    except SteerError:
        return None
    _, mark, behind = text.rpartition(_MARK)
    ids = part_tokens(tokenizer, behind.lstrip()) if mark else []
    others = {getattr(tokenizer, name, None) for name in ("bos_token_id", "unk_token_id")}
    if not ids or ids[0] not in special_tokens(tokenizer) or ids[0] in others:
        return None
    return ids[0]


def answer_end(tokenizer: Any, *, chat: bool) -> int | None:
    """The token that a model is taught to end an answer with: the end of the turn in a chat, else
    the tokenizer's end of a text."""
    turn = turn_end(tokenizer) if chat else None
    return getattr(tokenizer, "eos_token_id", None) if turn is None else turn


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """The ids of the tokenizer's special tokens, named and added."""
    named = frozenset(getattr(tokenizer, "all_special_ids", None) or ())
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(added, Mapping):
        return named
    return named | {id for id, token in added.items() if token.special}


def _ids(values: Iterable[Any]) -> frozenset[int]:
    found: set[int] = set()
    for value in values:
        several = value if isinstance(value, Sequence) else [value]
        found.update(id for id in several if id is not None)
    return frozenset(found)
