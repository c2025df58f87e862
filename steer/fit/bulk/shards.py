"""A folder of captured states: shards of rows in safetensors files, and `capture.json` about them.

Every shard holds n rows: `token`, `text` and `position` `[n]` int32, which say where a row was
read, and for each hook point `LAYER.SITE` `[n, width]`. Rows lie in the order of the texts, and a
text's rows all lie in one shard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from steer.artefacts.sae.storage.file_arrays import FileArray, OpenedFile, safetensors_arrays
from steer.errors import FileFormatError, StorageError
from steer.model import HookPoint
from steer.registry.blobs.disk import disk_errors
from steer.spec import Site, Where

CARD = "capture.json"
PLACES = ("token", "text", "position")
StoredType: TypeAlias = Literal["float32", "float16", "bfloat16"]
Numbers: TypeAlias = NDArray[np.int64]


class CapturedPoint(BaseModel):
    """A hook point that was read, and how wide it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    site: Site
    width: int

    @property
    def key(self) -> str:
        return f"{self.layer}.{self.site}"


class CapturedShard(BaseModel):
    """One file: its rows, and how many texts there are up to its end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    rows: int
    texts: int


class CaptureCard(BaseModel):
    """What a folder holds. `data` is a digest of the texts and of how they were read; `texts` is
    how many there are when the work is done, `whole` once it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["steering.capture"] = "steering.capture"
    model: str
    points: tuple[CapturedPoint, ...]
    dtype: StoredType
    pooled: Literal["none", "last", "mean", "max"]
    stride: int
    skip: int
    answer_tokens: int
    texts: int
    data: str
    where: Where | None = Field(default=None, exclude_if=lambda value: value is None)
    shards: tuple[CapturedShard, ...] = ()

    @property
    def rows(self) -> int:
        return sum(one.rows for one in self.shards)

    @property
    def texts_done(self) -> int:
        return self.shards[-1].texts if self.shards else 0

    @property
    def whole(self) -> bool:
        return self.texts_done == self.texts


def read_card(folder: Path) -> CaptureCard | None:
    """The card of a folder; None where there is none. Raises `FileFormatError`."""
    path = folder / CARD
    if not path.exists():
        return None
    try:
        return CaptureCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise FileFormatError(
            f"{path}: not what a capture writes: {error.errors()[0]['msg']}", code="invalid_capture"
        ) from error


def add_shard(
    folder: Path, card: CaptureCard, arrays: Mapping[str, Tensor], texts: int
) -> CaptureCard:
    """Writes a shard that ends with text number `texts`, and the card that names it.

    Both appear whole or not at all; a shard that no card names does not count. Raises
    `StorageError`.
    """
    name = f"states-{len(card.shards):05d}.safetensors"
    rows = len(arrays[PLACES[0]])
    grown = card.model_copy(
        update={"shards": (*card.shards, CapturedShard(file=name, rows=rows, texts=texts))}
    )
    with disk_errors("keeping captured states"):
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f"{name}.part"
        save_file(dict(arrays), staged)
        os.replace(staged, folder / name)
        staged = folder / f"{CARD}.part"
        staged.write_text(grown.model_dump_json(indent=1, by_alias=True) + "\n", "utf-8")
        os.replace(staged, folder / CARD)
    return grown


@dataclass(frozen=True)
class CapturedStates:
    """The rows of one hook point in a folder, read a few at a time.

    `tokens`, `texts` and `positions` `[rows]` say for each row which token it is of, in which text,
    and where. Files are read by position, so that what was read can leave memory again.
    """

    card: CaptureCard
    point: HookPoint
    width: int
    tokens: Numbers
    texts: Numbers
    positions: Numbers
    starts: Numbers
    files: Sequence[FileArray]

    @staticmethod
    def open(folder: Path, point: HookPoint | None = None) -> CapturedStates:
        """The states at `point`, which need not be said where only one was read.

        Raises `FileFormatError` for what is no capture, `StorageError` (`unfinished_capture`) for
        one that was not finished.
        """
        card = read_card(folder)
        if card is None:
            raise FileFormatError(f"{folder}: there is no {CARD} in it", code="no_capture")
        if not card.whole:
            raise StorageError(
                f"{folder}: {card.texts_done} of {card.texts} texts are captured: run the capture "
                "again, which goes on from there",
                code="unfinished_capture",
            )
        chosen = _chosen(folder, card, point)
        places: dict[str, list[Numbers]] = {name: [] for name in PLACES}
        files = []
        for shard in card.shards:
            arrays = _arrays(folder / shard.file)
            for name in PLACES:
                places[name].append(arrays[name].load().numpy().astype(np.int64))
            files.append(arrays[chosen.key])
        joined = {name: np.concatenate(parts) for name, parts in places.items()}
        starts = np.cumsum([0, *(one.rows for one in card.shards)])
        return CapturedStates(
            card,
            HookPoint(chosen.layer, chosen.site),
            chosen.width,
            joined["token"],
            joined["text"],
            joined["position"],
            starts,
            files,
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
            found[torch.from_numpy(here)] = self.files[shard].take(within.tolist()).float()
        return found


def _chosen(folder: Path, card: CaptureCard, point: HookPoint | None) -> CapturedPoint:
    for one in card.points:
        if point is None and len(card.points) == 1:
            return one
        if point == HookPoint(one.layer, one.site):
            return one
    known = ", ".join(one.key for one in card.points)
    asked = "none is named" if point is None else f"got {point}"
    raise FileFormatError(f"{folder} holds the hook points {known}: {asked}", code="no_capture")


def _arrays(path: Path) -> dict[str, FileArray]:
    try:
        return safetensors_arrays(OpenedFile.at(path))[0]
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror or error}", code="no_capture"
        ) from error
