"""The text of a token by itself.

Most tokens are pieces of text. One that is a part of a character has no text of its own, and is
shown in two ways: `token_texts` in the tokenizer's notation, for people; `openai_token` by its
bytes, as OpenAI's log-probabilities report it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

BROKEN = "\ufffd"
"""What decoding leaves of a character whose other parts are missing."""


SPACE = "\u2581"
"""SentencePiece's sign for a space."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token by itself; a part of a character is given in the tokenizer's own
    notation."""
    texts = []
    for token in ids:
        text = _text(tokenizer, token)
        texts.append(_piece(tokenizer, token) if BROKEN in text else text)
    return tuple(texts)


def openai_token(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """A single token as OpenAI reports it: its text and its bytes.

    A part of a character has no text of its own; it is written `bytes:\\xe2\\x82`.
    """
    text = _text(tokenizer, token)
    if BROKEN not in text:
        return text, list(text.encode())
    raw = piece_bytes(_piece(tokenizer, token))
    if raw is None:
        return text, None
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def _text(tokenizer: Any, token: int) -> str:
    """What the token alone decodes to, with the space that SentencePiece leaves off there because
    nothing stands before it."""
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    if not text.startswith((" ", SPACE)) and _piece(tokenizer, token).startswith(SPACE):
        return " " + text
    return text


def _piece(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens([token])[0])


def piece_bytes(piece: str) -> bytes | None:
    """The bytes behind a vocabulary entry in SentencePiece's or in byte-level BPE's notation, if
    that is what it is."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(match[1])
    table = _byte_characters()
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return None


@cache
def _byte_characters() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}
