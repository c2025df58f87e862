"""Captures of whole data sets: texts through the serving engine, states into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steer.engines.base import Captured, CaptureRequest, Engine
from steer.errors import SpecError, SteerError, TooLarge
from steer.fit.bulk.card import (
    CaptureCard,
    CapturedPoint,
    Pooling,
    StoredType,
    other_capture,
    own_info,
    read_card,
)
from steer.fit.bulk.selected import SelectedTokens, SteeredTexts, nothing_selected
from steer.fit.bulk.shards import (
    DIGEST,
    GENERATED,
    ITEM,
    LENGTH,
    PLACES,
    CapturedStates,
    add_shard,
    sound_part,
    text_digest,
)
from steer.fit.data.answering import with_own_answers
from steer.fit.data.texts import Tokens
from steer.fit.states import Progress
from steer.model import HookPoint
from steer.registry.blobs import locks
from steer.registry.blobs.disk import disk_errors

SHARD_BYTES = 256 << 20
_ALIKE = 0.05
"""How far, as a share of its norm, a state that is read again may lie from the one in a file."""
_LOCK = "capture.lock"


@dataclass(frozen=True)
class BulkReading:
    """Which states are kept of every text.

    Of the tokens from number `skip` on (those that are selected) every `stride`-th is read, and
    `pooled` makes one row of them. With `answer_tokens` the model first answers each text with up
    to so many tokens, sampled at `temperature` with `seed` and the text's number, which are read as
    well. `batch` texts run at once.
    """

    points: tuple[HookPoint, ...]
    pooled: Pooling = "none"
    stride: int = 1
    skip: int = 0
    answer_tokens: int = 0
    temperature: float = 1.0
    seed: int = 0
    batch: int = 16
    dtype: StoredType = "bfloat16"


@dataclass(frozen=True)
class CaptureLimits:
    """The most that one capture may write; None is no limit."""

    rows: int | None = None
    bytes: int | None = None

    def check(self, rows: int, size: int) -> None:
        """Raises `TooLarge` (`capture_too_large`) for more `rows` or a greater `size`."""
        for what, found, most in (("rows", rows, self.rows), ("bytes", size, self.bytes)):
            if most is not None and found > most:
                raise TooLarge(
                    f"the capture has at least {found} {what}, and {most} are left to it: give "
                    "fewer texts or hook points, a larger stride, a selection or a pooling",
                    code="capture_too_large",
                )


NO_LIMITS = CaptureLimits()


def capture_to(
    engine: Engine,
    texts: Sequence[Tokens],
    folder: Path,
    reading: BulkReading,
    *,
    items: Sequence[int] | None = None,
    selected: SelectedTokens | None = None,
    steered: SteeredTexts | None = None,
    shard_bytes: int = SHARD_BYTES,
    limits: CaptureLimits = NO_LIMITS,
    progress: Progress | None = None,
) -> CaptureCard:
    """Reads `texts` and keeps their states in `folder`, or those of `selected` tokens alone; where
    they are `steered`, as the model has them with the edits. One that was ended goes on after its
    last sound shard, in the same batches. `items` says for each text what number its item has in
    the data (None: its own). `progress` is told of texts.

    Memory: one shard, and the states of one batch. Raises `SteerError`: `other_capture` where the
    folder holds one of other texts, read otherwise or by a model of other weights,
    `nothing_selected` where no text had a token to keep, `capture_too_large` beyond the `limits`.
    """
    work = _TextReading(
        engine, texts, range(len(texts)) if items is None else items, reading, selected, steered
    )
    asked = work.card()
    row_bytes = sum(one.width for one in asked.points) * getattr(torch, reading.dtype).itemsize
    if selected is None:
        rows = _fewest_rows(texts, reading)
        limits.check(rows, rows * row_bytes)
    with disk_errors("opening the folder of a capture"):
        folder.mkdir(parents=True, exist_ok=True)
    with locks.exclusive(folder / _LOCK):
        card = _begun(work, folder, asked)
        if progress is not None:
            progress(card.texts_done)
        held: list[dict[str, Tensor]] = []
        done, rows = card.texts_done, 0
        for one in work.read(done):
            held.append(one)
            done, rows = done + 1, rows + len(one[PLACES[0]])
            limits.check(card.rows + rows, (card.rows + rows) * row_bytes)
            if rows * row_bytes >= shard_bytes or done == card.texts:
                joined = {name: torch.cat([kept[name] for kept in held]) for name in held[0]}
                card = add_shard(folder, card, joined, done)
                held, rows = [], 0
            if progress is not None:
                progress(1)
    if selected is not None and card.rows == 0:
        raise nothing_selected("/where", len(texts))
    return card


@dataclass(frozen=True)
class _TextReading:
    """Texts, and how they are read."""

    engine: Engine
    texts: Sequence[Tokens]
    items: Sequence[int]
    reading: BulkReading
    selected: SelectedTokens | None
    steered: SteeredTexts | None

    def card(self) -> CaptureCard:
        """What is asked for. Raises `SteerError` for what the model cannot read."""
        reading, info = self.reading, self.engine.info
        for point in reading.points:
            info.check_point(point)
        return CaptureCard(
            info=own_info(info),
            engine=self.engine.capabilities.engine,
            points=tuple(
                CapturedPoint(layer=p.layer, site=p.site, width=info.width(p.site))
                for p in reading.points
            ),
            dtype=reading.dtype,
            pooled=reading.pooled,
            stride=reading.stride,
            skip=reading.skip,
            answer_tokens=reading.answer_tokens,
            # Of no answers they say nothing.
            temperature=reading.temperature if reading.answer_tokens else 0.0,
            seed=reading.seed if reading.answer_tokens else 0,
            steering=None if self.steered is None else self.steered.plan.fingerprint,
            texts=len(self.texts),
            texts_sha256=_sha256(self.texts, self.items, info.vocab_size),
            where=None if self.selected is None else self.selected.where,
        )

    def read(self, first: int) -> Iterator[dict[str, Tensor]]:
        """The rows of each text from number `first` on, as a shard holds them.

        Batches begin where they would have begun without an end in between: a text among other
        texts may be rounded otherwise.
        """
        size = self.reading.batch
        for start in range(first - first % size, len(self.texts), size):
            own = self.texts[start : start + size]
            group = self._answered(own, start) if self.reading.answer_tokens else list(own)
            request = CaptureRequest(group, self.reading.points)
            if self.steered is not None:
                request = self.steered.asked(request, start, [len(text) for text in own])
            for n, captured in enumerate(self.engine.capture(request), start):
                if n >= first:
                    yield self._rows(n, group[n - start], captured)

    def _answered(self, texts: Sequence[Tokens], first: int) -> list[Tokens]:
        reading, steered = self.reading, self.steered
        return with_own_answers(
            self.engine,
            texts,
            reading.answer_tokens,
            temperature=reading.temperature,
            seed=reading.seed,
            first=first,
            plan=None if steered is None else steered.plan,
            roles=lambda n: None if steered is None else steered.roles(n, 0),
        )

    def _rows(self, number: int, text: Tokens, captured: Captured) -> dict[str, Tensor]:
        reading = self.reading
        chosen = range(len(text)) if self.selected is None else self.selected.of(number, text)
        read = [place for place in chosen if place >= reading.skip]
        places = torch.tensor(read, dtype=torch.int64)[:: reading.stride]
        # A pooled row is said to be of the last token that went into it.
        kept = places if reading.pooled == "none" else places[-1:]
        rows = {
            PLACES[0]: torch.tensor(text, dtype=torch.int32)[kept],
            PLACES[1]: torch.full((len(kept),), number, dtype=torch.int32),
            PLACES[2]: kept.to(torch.int32),
            GENERATED: (kept >= len(self.texts[number])).to(torch.uint8),
            ITEM: torch.tensor([self.items[number]], dtype=torch.int32),
            LENGTH: torch.tensor([len(text)], dtype=torch.int32),
            DIGEST: torch.frombuffer(bytearray(text_digest(text)), dtype=torch.uint8)[None],
        }
        for point in reading.points:
            states = _pooled(captured.states[point][places], reading.pooled)
            rows[str(point)] = stored = states.to(getattr(torch, reading.dtype))
            if not bool(stored.isfinite().all()):
                raise SteerError(
                    f"a state of text {number} at {point} is as large as "
                    f"{float(states.abs().max()):.3g}, which {reading.dtype} cannot hold: keep "
                    "them in float32 or bfloat16",
                    param="/stored",
                    code="not_finite",
                )
        return rows


def _sha256(texts: Sequence[Tokens], items: Sequence[int], vocabulary: int) -> str:
    """The hash of the tokens and of where they came from; raises `SteerError` for other numbers."""
    if not texts:
        raise SteerError("there is no text to read", code="no_prompts")
    found = hashlib.sha256()
    for n, (text, item) in enumerate(zip(texts, items, strict=True)):
        wrong = [token for token in text if not 0 <= token < vocabulary]
        if wrong:
            raise SpecError(
                f"the token {wrong[0]} of text {n} is not in the vocabulary of {vocabulary}",
                code="unknown_token",
            )
        found.update(np.asarray([item, len(text), *text], dtype="<i8").tobytes())
    return found.hexdigest()


def _fewest_rows(texts: Sequence[Tokens], reading: BulkReading) -> int:
    """How many rows there are, answers left out."""
    read = (max(0, len(text) - reading.skip) for text in texts)
    if reading.pooled != "none":
        return sum(count > 0 for count in read)
    return sum(-(-count // reading.stride) for count in read)


def _begun(work: _TextReading, folder: Path, asked: CaptureCard) -> CaptureCard:
    """The card with what is there already. Raises `SteerError` (`other_capture`)."""
    begun = read_card(folder)
    if begun is None:
        return asked
    if begun.data != asked.data:
        raise other_capture(folder, begun, asked)
    sound = sound_part(folder, begun)
    if sound.rows and not sound.whole:
        _check_weights(work, folder, sound)
    return sound


def _check_weights(work: _TextReading, folder: Path, sound: CaptureCard) -> None:
    """Reads a text of the last shard again: a model may keep its name and change its weights."""
    point = sound.points[0]
    there = CapturedStates.of(folder, sound, point.point)
    text = int(there.texts[-1])
    numbers = np.flatnonzero(there.texts == text)
    again = next(work.read(text))
    kept, found = there.rows(numbers), again[point.key].float()
    same = there.tokens[numbers].tolist() == again[PLACES[0]].tolist()
    if not same or float((kept - found).norm()) > _ALIKE * float(kept.norm()):
        raise SteerError(
            f"{folder.name!r} holds a capture by a model of the same name that reads text {text} "
            "otherwise: its weights are others. Name another folder, or remove this one",
            code="other_capture",
        )


def _pooled(states: Tensor, pooled: Pooling) -> Tensor:
    if pooled == "none" or not len(states):
        return states
    if pooled == "last":
        return states[-1:]
    if pooled == "mean":
        return states.mean(0, keepdim=True)
    return states.amax(0, keepdim=True)
