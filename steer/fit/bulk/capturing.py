"""Captures of whole data sets: texts through the serving engine, states into shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.errors import SteerError
from steer.fit.bulk.selected import SelectedTokens, Tokens, nothing_selected
from steer.fit.bulk.shards import (
    PLACES,
    CaptureCard,
    CapturedPoint,
    StoredType,
    add_shard,
    read_card,
)
from steer.fit.data.answering import with_own_answers
from steer.fit.states import Progress
from steer.model import HookPoint

Pooling: TypeAlias = Literal["none", "last", "mean", "max"]
SHARD_BYTES = 256 << 20


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


def capture_to(
    engine: Engine,
    texts: Sequence[Tokens],
    folder: Path,
    reading: BulkReading,
    *,
    selected: SelectedTokens | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> CaptureCard:
    """Reads `texts` and keeps their states in `folder`, or those of `selected` tokens alone; one
    that was ended goes on after its last shard. `progress` is told of texts.

    Memory: one shard, and the states of one batch. Raises `SteerError`: `other_capture` where the
    folder holds one of other texts, `nothing_selected` where no text had a token to keep.
    """
    for point in reading.points:
        engine.info.check_point(point)
    card = _begun(engine, texts, folder, reading, selected)
    width = sum(one.width for one in card.points)
    at_once = max(1, shard_bytes // (width * getattr(torch, reading.dtype).itemsize))
    if progress is not None:
        progress(card.texts_done)
    rows: list[dict[str, Tensor]] = []
    done = card.texts_done
    for one in _read(engine, texts, done, reading, selected):
        rows.append(one)
        done += 1
        if sum(len(kept["token"]) for kept in rows) >= at_once or done == len(texts):
            joined = {name: torch.cat([kept[name] for kept in rows]) for name in rows[0]}
            card = add_shard(folder, card, joined, done)
            rows = []
        if progress is not None:
            progress(1)
    if selected is not None and card.rows == 0:
        raise nothing_selected("/where", len(texts))
    return card


def _begun(
    engine: Engine,
    texts: Sequence[Tokens],
    folder: Path,
    reading: BulkReading,
    selected: SelectedTokens | None,
) -> CaptureCard:
    if not texts:
        raise SteerError("there is no text to read", code="no_prompts")
    how = {**asdict(reading), "batch": None}  # memory, and not the result
    if selected is not None:
        how["where"] = selected.as_json
    data = hashlib.sha256(json.dumps([engine.info.own_name, how, list(texts)]).encode()).hexdigest()
    card = CaptureCard(
        model=engine.info.own_name,
        points=tuple(
            CapturedPoint(layer=p.layer, site=p.site, width=engine.info.width(p.site))
            for p in reading.points
        ),
        dtype=reading.dtype,
        pooled=reading.pooled,
        stride=reading.stride,
        skip=reading.skip,
        answer_tokens=reading.answer_tokens,
        texts=len(texts),
        data=data,
        where=None if selected is None else selected.where,
    )
    begun = read_card(folder)
    if begun is None:
        return card
    if begun.data != data:
        raise SteerError(
            f"{folder} holds another capture: of {begun.texts} texts by {begun.model!r}, read "
            "otherwise or other texts: name another folder, or remove it",
            code="other_capture",
        )
    return begun


def _read(
    engine: Engine,
    texts: Sequence[Tokens],
    first: int,
    reading: BulkReading,
    selected: SelectedTokens | None,
) -> Iterator[dict[str, Tensor]]:
    """The rows of each text from number `first` on, as a shard holds them."""
    for start in range(first, len(texts), reading.batch):
        group = list(texts[start : start + reading.batch])
        if reading.answer_tokens:
            group = with_own_answers(
                engine,
                group,
                reading.answer_tokens,
                temperature=reading.temperature,
                seed=reading.seed,
                first=start,
            )
        for n, (text, captured) in enumerate(
            zip(group, engine.capture(CaptureRequest(group, reading.points)), strict=True), start
        ):
            chosen = range(len(text)) if selected is None else selected.of(n, text)
            read = [place for place in chosen if place >= reading.skip]
            places = torch.tensor(read, dtype=torch.int64)[:: reading.stride]
            # A pooled row is said to be of the last token that went into it.
            kept = places if reading.pooled == "none" else places[-1:]
            row = {
                PLACES[0]: torch.tensor(text, dtype=torch.int32)[kept],
                PLACES[1]: torch.full((len(kept),), n, dtype=torch.int32),
                PLACES[2]: kept.to(torch.int32),
            }
            for point in reading.points:
                states = _pooled(captured.states[point][places], reading.pooled)
                row[f"{point.layer}.{point.site}"] = states.to(getattr(torch, reading.dtype))
            yield row


def _pooled(states: Tensor, pooled: Pooling) -> Tensor:
    if pooled == "none" or not len(states):
        return states
    if pooled == "last":
        return states[-1:]
    if pooled == "mean":
        return states.mean(0, keepdim=True)
    return states.amax(0, keepdim=True)
