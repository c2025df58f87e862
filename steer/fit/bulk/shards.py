"""A folder of captured states: shards of rows in safetensors files, and `capture.json` about them.

Every shard holds n rows: `token`, `text` and `position` `[n]` int32, which say where a row was
read, `generated` `[n]` uint8, which is 1 where the model said the token, and for each hook point
`LAYER.SITE` `[n, width]`. Rows lie in the order of the texts, and a text's rows all lie in one
shard. Of each of its t texts, those without rows included, it holds the number of the `item` of the
data that it came from `[t]` int32, its `length` `[t]` int32, and a `digest` `[t, 16]` uint8 of its
tokens, by which it is found again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from steer.artefacts.sae.storage.file_arrays import FileArray, OpenedFile, safetensors_arrays
from steer.errors import FileFormatError, SteerError, StorageError
from steer.fit.bulk.card import (
    CARD,
    CaptureCard,
    CapturedPoint,
    CapturedShard,
    read_card,
    shown,
    write_card,
)
from steer.model import HookPoint
from steer.registry.blobs.disk import disk_errors

PLACES = ("token", "text", "position")
GENERATED, ITEM, LENGTH, DIGEST = "generated", "item", "length", "digest"
DIGEST_BYTES = 16
Numbers: TypeAlias = NDArray[np.int64]


def text_digest(tokens: Sequence[int]) -> bytes:
    """By what a text is found: a hash of its token ids."""
    ids = np.asarray(tokens, dtype="<i4").tobytes()
    return hashlib.sha256(ids).digest()[:DIGEST_BYTES]


def add_shard(
    folder: Path, card: CaptureCard, arrays: Mapping[str, Tensor], texts: int
) -> CaptureCard:
    """Writes a shard that ends with text number `texts`, and the card that names it.

    Both appear whole or not at all; a shard that no card names does not count. Raises
    `StorageError`.
    """
    name = f"states-{len(card.shards):05d}.safetensors"
    with disk_errors("keeping captured states"):
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f"{name}.part"
        save_file(dict(arrays), staged)
        written = CapturedShard(
            file=name,
            rows=len(arrays[PLACES[0]]),
            texts=texts,
            bytes=staged.stat().st_size,
            sha256=_sha256(staged),
        )
        with staged.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(staged, folder / name)
    grown = card.model_copy(update={"shards": (*card.shards, written)})
    write_card(folder, grown)
    return grown


def sound_part(folder: Path, card: CaptureCard) -> CaptureCard:
    """`card` up to the first shard that is missing or of another size."""
    sound = 0
    for one in card.shards:
        try:
            if (folder / one.file).stat().st_size != one.bytes:
                break
        except OSError:
            break
        sound += 1
    return card.model_copy(update={"shards": card.shards[:sound]})


def missing_shards(folder: Path, names: Sequence[str]) -> set[str]:
    """Those of `names` that are not in `folder` as its card has them, to the byte; all of them
    where there is no card."""
    card = read_card(folder)
    known = {} if card is None else {one.file: one for one in card.shards}

    def is_here(name: str) -> bool:
        path = folder / name
        return name in known and path.is_file() and _sha256(path) == known[name].sha256

    return {name for name in names if not is_here(name)}


def check_shards(folder: Path, card: CaptureCard) -> None:
    """Raises `FileFormatError` (`damaged_capture`) where a shard is not the one that was written,
    to the byte: every file is read."""
    for one in card.shards:
        with disk_errors(f"reading {one.file}"):
            found = _sha256(folder / one.file)
        if found != one.sha256:
            raise _damaged(folder / one.file, f"its sha256 is {found}, and {CARD} has {one.sha256}")


class StatesBatch(NamedTuple):
    """Some rows, float32 `[n, width]`, with what is known of each `[n]`."""

    states: Float[Tensor, "n width"]
    numbers: Numbers
    tokens: Numbers
    texts: Numbers
    positions: Numbers
    generated: NDArray[np.bool_]


@dataclass(frozen=True)
class CapturedStates:
    """The rows of one hook point in a folder, read a few at a time.

    `tokens`, `texts` and `positions` `[rows]` say for each row which token it is of, in which text,
    and where, `generated` whether the model said it. `items`, `lengths` and `digests` are those of
    the texts in their order. Files are read by position, so that what was read can leave memory.
    """

    card: CaptureCard
    point: HookPoint
    width: int
    tokens: Numbers
    texts: Numbers
    positions: Numbers
    generated: NDArray[np.bool_]
    items: Numbers
    lengths: Numbers
    digests: NDArray[np.uint8]
    starts: Numbers
    files: Sequence[FileArray]

    @staticmethod
    def open(
        folder: Path, point: HookPoint | None = None, *, verify: bool = False
    ) -> CapturedStates:
        """The states at `point`, which need not be said where only one was read; with `verify`
        every file is read, and held against its hash.

        Raises `FileFormatError` for what is no capture, or holds other files than it says,
        `StorageError` (`unfinished_capture`) for one that was not finished.
        """
        card = whole_card(folder)
        if verify:
            check_shards(folder, card)
        return CapturedStates.of(folder, card, point)

    @staticmethod
    def of(folder: Path, card: CaptureCard, point: HookPoint | None) -> CapturedStates:
        """Those in the shards of `card`, be it whole or not; raises as `open`."""
        chosen = _chosen(folder, card, point)
        parts = [_ShardArrays.read(folder, card, place) for place in range(len(card.shards))]

        def joined(name: str) -> NDArray[np.int64]:
            found = [part.arrays[name].load().numpy().astype(np.int64) for part in parts]
            return np.concatenate(found) if found else np.zeros(0, np.int64)

        return CapturedStates(
            card,
            chosen.point,
            chosen.width,
            joined(PLACES[0]),
            joined(PLACES[1]),
            joined(PLACES[2]),
            joined(GENERATED).astype(np.bool_),
            joined(ITEM),
            joined(LENGTH),
            joined(DIGEST).astype(np.uint8).reshape(-1, DIGEST_BYTES),
            np.cumsum([0, *(one.rows for one in card.shards)]),
            [part.arrays[chosen.key] for part in parts],
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, numbers: Numbers) -> Float[Tensor, "n width"]:
        """The rows of these numbers, in their order, as float32."""
        found = torch.empty(len(numbers), self.width)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            within = numbers[here] - self.starts[shard]
            file = self.files[shard]
            in_a_row = len(within) > 1 and bool((np.diff(within) == 1).all())
            rows = (
                file.rows(int(within[0]), int(within[-1]) + 1)
                if in_a_row
                else file.take(within.tolist())
            )
            found[torch.from_numpy(here)] = rows.float()
        return found

    def batches(
        self, size: int, *, seed: int | None = None, epoch: int = 0
    ) -> Iterator[StatesBatch]:
        """All rows, `size` at a time and the rest at the end: as they lie, or shuffled by `seed`
        and `epoch`, in the same order whenever it is asked for."""
        if size < 1:
            raise SteerError(f"a batch of {size!r} rows: give at least 1", code="invalid_option")
        order = np.arange(len(self))
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            yield StatesBatch(
                self.rows(numbers),
                numbers,
                self.tokens[numbers],
                self.texts[numbers],
                self.positions[numbers],
                self.generated[numbers],
            )

    @cached_property
    def text_starts(self) -> Numbers:
        """`[texts + 1]`: the number of each text's first row, and behind them that of all rows."""
        found: Numbers = np.searchsorted(self.texts, np.arange(self.card.texts + 1))
        return found


def whole_card(folder: Path) -> CaptureCard:
    """The card of a finished capture; raises as `CapturedStates.open`."""
    card = read_card(folder)
    if card is None:
        raise FileFormatError(f"{folder.name}: there is no {CARD} in it", code="no_capture")
    if not card.whole:
        raise StorageError(
            f"{folder.name}: {card.texts_done} of {card.texts} texts are captured: run the capture "
            "again, which goes on from there",
            code="unfinished_capture",
        )
    return card


@dataclass(frozen=True)
class _ShardArrays:
    """The arrays of one file, which are what the card says."""

    arrays: Mapping[str, FileArray]

    @staticmethod
    def read(folder: Path, card: CaptureCard, place: int) -> _ShardArrays:
        """Shard number `place`; raises `FileFormatError` (`damaged_capture`), `StorageError`."""
        one = card.shards[place]
        path = folder / one.file
        before = card.shards[place - 1].texts if place else 0
        try:
            file = OpenedFile.at(path)
        except OSError as error:
            raise StorageError(
                f"{shown(path)} cannot be read: {error.strerror or error}", code="no_capture"
            ) from error
        if file.size != one.bytes:
            raise _damaged(path, f"it has {file.size} bytes, and {CARD} says {one.bytes}")
        try:
            arrays = safetensors_arrays(file)[0]
        except FileFormatError as error:
            raise _damaged(path, error.message) from error
        kept = one.texts - before
        stored = getattr(torch, card.dtype)
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            **dict.fromkeys(PLACES, (torch.int32, (one.rows,))),
            GENERATED: (torch.uint8, (one.rows,)),
            ITEM: (torch.int32, (kept,)),
            LENGTH: (torch.int32, (kept,)),
            DIGEST: (torch.uint8, (kept, DIGEST_BYTES)),
            **{p.key: (stored, (one.rows, p.width)) for p in card.points},
        }
        for name, (dtype, shape) in wanted.items():
            found = arrays.get(name)
            if found is None or (found.dtype, found.shape) != (dtype, shape):
                has = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise _damaged(
                    path, f"{name!r} is {has}, and by {CARD} it is {dtype} {list(shape)}"
                )
        texts = arrays[PLACES[1]].load()
        if len(texts) and not (
            before <= int(texts[0])
            and int(texts[-1]) < one.texts
            and bool((texts[1:] >= texts[:-1]).all())
        ):
            raise _damaged(path, f"its rows are not of the texts {before} to {one.texts - 1}")
        return _ShardArrays(arrays)


def _damaged(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        f"{shown(path)} is not what was captured: {why}. Copy the file again, or remove the folder "
        "and capture anew",
        code="damaged_capture",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _chosen(folder: Path, card: CaptureCard, point: HookPoint | None) -> CapturedPoint:
    for one in card.points:
        if point == one.point or (point is None and len(card.points) == 1):
            return one
    known = ", ".join(one.key for one in card.points)
    asked = "none is named" if point is None else f"got {point}"
    raise FileFormatError(
        f"{folder.name!r} holds the hook points {known}: {asked}", code="no_capture"
    )
