"""Text to tokens, and generated tokens to text.

The rule for special tokens, which every engine, plan, fit and inspection keeps: a text that is a
whole prompt gets those that the tokenizer puts around a sequence (`text_tokens`), but never a
second beginning beside one that it spells out. A chat gets none beside those that its template
writes (`steer.prompts.chat`), and text that stands within a sequence or goes on from one (a
trigger, a response, an answer) gets none at all (`part_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.prompts.labels import SPACE


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """`text` as a whole prompt, with the tokenizer's own special tokens.

    A text that already begins with the token for the beginning, as one that was written by a chat
    template, does not get it twice.
    """
    ids = list(tokenizer.encode(text))
    if ids[1:] and ids[0] == ids[1] and begins(tokenizer, ids):
        spelled = part_tokens(tokenizer, text)
        return ids[1:] if len(ids) > len(spelled) and ids[1:][: len(spelled)] == spelled else ids
    return ids


def begins(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether the first of `ids` is a token that the tokenizer puts before a text."""
    names = ("bos_token_id", "cls_token_id")
    return ids[0] in {getattr(tokenizer, name, None) for name in names} - {None}


def part_tokens(tokenizer: Any, text: str) -> list[int]:
    """`text` as a part of a sequence: no special token but those that it spells out."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def inner_tokens(tokenizer: Any, text: str) -> list[int]:
    """`text` as it stands in the middle of another, where its leading space is its own.

    SentencePiece puts a space of its own before the first word of whatever it is given, so that
    ` Paris` alone would have two.
    """
    alone = part_tokens(tokenizer, text)
    line = part_tokens(tokenizer, "\n")
    if not alone or not _begins_with_space(tokenizer, part_tokens(tokenizer, "a")):
        return alone
    behind = part_tokens(tokenizer, "\n" + text)
    return behind[len(line) :] if behind[: len(line)] == line else alone


def trigger_tokens(tokenizer: Any, text: str) -> list[int]:
    """`text` as a trigger, which is best one token: as the tokenizer reads it alone, or else as
    it reads it in the middle of a text."""
    alone = part_tokens(tokenizer, text)
    return alone if len(alone) == 1 else inner_tokens(tokenizer, text)


def _begins_with_space(tokenizer: Any, ids: Sequence[int]) -> bool:
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return bool(pieces) and str(pieces[0]).startswith(SPACE)


def answer_text(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    """`tokens` as text, without special tokens unless `special`."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not special))
