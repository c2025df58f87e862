"""Tokens as short labels that a picture can show."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

_MORE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial Unicode MS",
    "Segoe UI Emoji",
)
_VISIBLE = {"\n": "⏎", "\t": "⇥"}
_NO_GLYPH = "□"


@cache
def fonts() -> tuple[str, ...]:
    """The fonts to draw with, in order: DejaVu Sans comes with matplotlib, the others may be
    installed."""
    installed = set(_manager().get_font_names())
    return ("DejaVu Sans", *(name for name in _MORE_FONTS if name in installed))


@cache
def _characters() -> frozenset[int]:
    """What those fonts have a glyph for."""
    manager = _manager()
    paths = (manager.findfont(manager.FontProperties(family=name)) for name in fonts())
    return frozenset(code for path in paths for code in manager.get_font(path).get_charmap())


def _manager() -> Any:
    from matplotlib import font_manager  # noqa: PLC0415 (slow import)

    return font_manager


def _drawable(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    known = ord(character) in _characters() and character.isprintable()
    return character if known else _NO_GLYPH


def place_label(tokens: Sequence[str], position: int) -> str:
    """The token at `position`, with the position below it."""
    return f"{token_label(tokens[position])}\n{position}"


def token_label(token: str, most: int = 13) -> str:
    """A token as a short label: white space made visible where there is nothing else.

    Wide (East Asian) characters count twice.
    """
    visible = "".join(map(_drawable, token))
    text = visible.strip(" ") or "␣" * len(visible)
    width = 0
    for place, character in enumerate(text):
        width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width > most:
            return text[: max(place - 1, 1)] + "…"
    return text
