"""What each token of a vocabulary stands for, in bytes: what a text among tokens is sought in."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from steer.prompts.labels import openai_token

_known: weakref.WeakKeyDictionary[Any, tuple[bytes, ...]] = weakref.WeakKeyDictionary()
_reading = threading.Lock()


def vocabulary_of(tokenizer: Any, size: int) -> tuple[bytes, ...]:
    """The bytes of each of the `size` tokens of a model; empty for those that its tokenizer does
    not know, or of which it does not say them. Read once for each tokenizer (a second, where it is
    large)."""
    with _reading:
        found = _known.get(tokenizer, ())
        if len(found) != size:
            found = tuple(_bytes(tokenizer, token) for token in range(size))
            _known[tokenizer] = found
    return found


def _bytes(tokenizer: Any, token: int) -> bytes:
    try:
        said = openai_token(tokenizer, token)[1]
    except (
        Exception
    ):  # tokenizers say in their own ways that a model has more rows than they tokens
        return b""
    return bytes(said or ())
