"""The states that SmolLM2's SAE is trained on: of prose, and of chats that the model wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steer_vectors.smollm2.sae.texts import prose, questions
from tqdm import tqdm

from steer.engines.base import Engine
from steer.fit.bulk.capturing import BulkReading, capture_to
from steer.fit.bulk.selected import pieces
from steer.fit.bulk.shards import CapturedStates
from steer.fit.data.texts import Tokens
from steer.model import HookPoint
from steer.prompts import as_chat
from steer.registry.location import cache_folder

LAYER = 14
POINT = HookPoint(LAYER)
CONTEXT = 128
OF_EACH = 600
"""Passages of a package."""
CHATS, ANSWER = 640, 96
SEED = 0
SHARD = 32 << 20
_HEADER = 3
"""Tokens of a chat's common beginning that are read all the same: those that open the question."""


def cache() -> Path:
    """Where packages and states are kept."""
    return cache_folder() / "smollm2-sae"


@dataclass(frozen=True)
class Collected:
    """Captures, what each was asked to read, and the packages that the prose is from."""

    captures: list[CapturedStates]
    texts: list[list[Tokens]]
    packages: list[str]


def collect(engine: Engine) -> Collected:
    """The states after block `LAYER`. What was begun goes on."""
    passages, packages = prose(cache() / "debian", OF_EACH, SEED)
    texts, _ = pieces(engine, passages, CONTEXT)
    asked = questions(cache() / "debian", CHATS, SEED)
    chats, _ = pieces(engine, [as_chat(engine.tokenizer, one) for one in asked])
    skip = _common(chats) - _HEADER
    of_chats = BulkReading((POINT,), skip=skip, answer_tokens=ANSWER, seed=SEED, batch=64)
    captures = [
        _read(engine, "prose", texts, BulkReading((POINT,), skip=1, batch=32)),
        _read(engine, "chats", chats, of_chats),
    ]
    return Collected(captures, [texts, chats], packages)


def _read(engine: Engine, name: str, texts: list[Tokens], reading: BulkReading) -> CapturedStates:
    with tqdm(total=len(texts), desc=name, unit="text", mininterval=10) as bar:
        capture_to(engine, texts, cache() / name, reading, shard_bytes=SHARD, progress=bar.update)
    return CapturedStates.open(cache() / name)


def _common(texts: list[Tokens]) -> int:
    """How many first tokens are the same in all."""
    return next(n for n, row in enumerate(zip(*texts, strict=False)) if len(set(row)) > 1)
