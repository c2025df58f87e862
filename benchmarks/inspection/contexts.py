"""Contexts: pieces of text, each up to some token.

Two sources need no download. `docs` is the documentation of Python's language, which every CPython
brings (`pydoc_data.topics`; PSF licence). `answers` are the model's own answers to plain questions,
at temperature 1: what it meets when it serves, but text that it finds likely.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.prompts import render, text_tokens

Tokens = tuple[int, ...]
LEAST, MOST = 8, 32
"""Tokens of a context."""

SUBJECTS = (
    "the sea", "a bicycle", "bread", "the moon", "a library", "rain", "a good teacher", "chess",
    "the heart", "a garden", "trains", "the printing press", "coffee", "a long walk", "bees",
    "music", "the desert", "money", "a bridge", "sleep", "winter", "a market", "maps", "glass",
    "an old friend", "volcanoes", "soap", "a village", "the telescope", "rice",
)  # fmt: skip
ASKS = ("Tell me about {}.", "Why do people care about {}?", "Write a short story about {}.")


@dataclass(frozen=True)
class Texts:
    """Texts to fit a lens on, and others to draw contexts from."""

    fitting: list[Tokens]
    reading: list[Tokens]


def documentation(engine: Engine, seed: int = 0) -> Texts:
    """The pages of Python's documentation, in pieces; a page is in one of the two parts."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    half = len(names) // 2
    return Texts(_pieces(engine, names[:half]), _pieces(engine, names[half:]))


def _pieces(engine: Engine, names: Sequence[str]) -> list[Tokens]:
    found = []
    for name in names:
        tokens = text_tokens(engine.tokenizer, topics[name][:4000])
        parts = [tuple(tokens[n : n + 128]) for n in range(0, len(tokens), 128)]
        found += [part for part in parts if len(part) > MOST]
    return found


def answers(engine: Engine, seed: int = 0) -> Texts:
    """The model's own answers; a subject is in one of the two parts."""
    parts = []
    for first in (0, 1):
        asked = [ask.format(subject) for subject in SUBJECTS[first::2] for ask in ASKS]
        requests = []
        for n, text in enumerate(asked):
            prompt = tuple(render(engine.tokenizer, [{"role": "user", "content": text}]))
            sampling = SamplingParams(max_tokens=128, seed=seed + n)
            requests.append(GenerationRequest(f"context-{n}", prompt, sampling))
        said = [one.tokens for one in engine.complete(requests)]
        parts.append([tokens for tokens in said if len(tokens) > MOST])
    return Texts(*parts)


SOURCES = {"docs": documentation, "answers": answers}


def draw_contexts(texts: Sequence[Tokens], count: int, seed: int = 0) -> list[Tokens]:
    """`count` pieces of `LEAST` to `MOST` tokens, from texts and places drawn by chance."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        text = draw.choice(texts)
        length = draw.randint(LEAST, MOST)
        start = draw.randrange(len(text) - length + 1)
        found.append(text[start : start + length])
    return found
