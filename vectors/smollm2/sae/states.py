"""The states that SmolLM2's SAE is trained on: of prose, and of chats that the model wrote."""

from __future__ import annotations

from pathlib import Path

from steer_vectors.smollm2.sae.texts import prose, questions
from tqdm import tqdm

from steer.engines.base import Engine
from steer.fit.bulk.capturing import BulkReading, Tokens, capture_to, pieces
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


def collect(engine: Engine) -> tuple[list[Path], list[str]]:
    """Folders with the states after block `LAYER`, and the packages that the prose is from. What
    was begun goes on."""
    _, packages = prose(cache() / "debian", OF_EACH, SEED)
    _read(engine, "prose", texts_of(engine), BulkReading((POINT,), skip=1, batch=32))
    asked = questions(cache() / "debian", CHATS, SEED)
    chats, _ = pieces(engine, [as_chat(engine.tokenizer, one) for one in asked])
    skip = _common(chats) - _HEADER
    reading = BulkReading((POINT,), skip=skip, answer_tokens=ANSWER, seed=SEED, batch=64)
    _read(engine, "chats", chats, reading)
    return [cache() / "prose", cache() / "chats"], packages


def texts_of(engine: Engine) -> list[Tokens]:
    """The prose, in pieces of `CONTEXT` tokens."""
    passages, _ = prose(cache() / "debian", OF_EACH, SEED)
    return pieces(engine, passages, CONTEXT)[0]


def _read(engine: Engine, name: str, texts: list[Tokens], reading: BulkReading) -> None:
    with tqdm(total=len(texts), desc=name, unit="text", mininterval=10) as bar:
        capture_to(engine, texts, cache() / name, reading, shard_bytes=SHARD, progress=bar.update)


def _common(texts: list[Tokens]) -> int:
    """How many first tokens are the same in all."""
    return next(n for n, row in enumerate(zip(*texts, strict=False)) if len(set(row)) > 1)
