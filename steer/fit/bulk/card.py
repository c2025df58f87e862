"""`capture.json`: what a folder of captured states holds, how it was read, and its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer.errors import FileFormatError, SteerError, StorageError, quoted
from steer.model import HookPoint, ModelInfo
from steer.registry.blobs.disk import disk_errors
from steer.spec import Site, Where

CARD = "capture.json"
StoredType: TypeAlias = Literal["float32", "float16", "bfloat16"]
Pooling: TypeAlias = Literal["none", "last", "mean", "max"]
Count: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CapturedPoint(BaseModel):
    """A hook point that was read, and how wide it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Count
    site: Site
    width: Annotated[int, Field(ge=1, strict=True)]

    @property
    def point(self) -> HookPoint:
        return HookPoint(self.layer, self.site)

    @property
    def key(self) -> str:
        return str(self.point)


class CapturedShard(BaseModel):
    """One file: its rows, how many texts there are up to its end, its size and its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # A name alone, so that no card leads out of its folder.
    file: Annotated[str, Field(pattern=r"^states-[0-9]{5,12}\.safetensors$")]
    rows: Count
    texts: Count
    bytes: Count
    sha256: Digest


class CaptureCard(BaseModel):
    """What a folder holds.

    `info` is the model under its own name, `engine` what ran it; `steering` the fingerprint of the
    plan under which all was read and answered. `texts` is how many there are when the work is done,
    `texts_sha256` the hash of their tokens; `whole` is whether the work is done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["steering.capture"] = "steering.capture"
    info: ModelInfo
    engine: str
    points: Annotated[tuple[CapturedPoint, ...], Field(min_length=1)]
    dtype: StoredType
    pooled: Pooling
    stride: Count
    skip: Count
    answer_tokens: Count
    temperature: float = 1.0
    seed: int = 0
    steering: str | None = None
    where: Where | None = Field(default=None, exclude_if=lambda value: value is None)
    texts: Count
    texts_sha256: Digest
    shards: tuple[CapturedShard, ...] = ()

    @property
    def model(self) -> str:
        """What the model calls itself."""
        return self.info.name

    @property
    def rows(self) -> int:
        return sum(one.rows for one in self.shards)

    @property
    def bytes(self) -> int:
        """How much the shards take on the disk."""
        return sum(one.bytes for one in self.shards)

    @property
    def texts_done(self) -> int:
        return self.shards[-1].texts if self.shards else 0

    @property
    def whole(self) -> bool:
        return self.texts_done == self.texts

    @property
    def data(self) -> str:
        """A hash of the texts and of how they were read, whatever of it is done."""
        settings = self.model_dump(mode="json", by_alias=True, exclude={"shards"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def differences(self, asked: CaptureCard) -> Iterator[tuple[str, Any, Any]]:
        """What `asked` says otherwise: the setting, what it is here, and what is asked for."""
        for name in type(self).model_fields:
            if name in ("object", "shards"):
                continue
            here, there = getattr(self, name), getattr(asked, name)
            if here != there:
                yield name, here, there


def own_info(info: ModelInfo) -> ModelInfo:
    """`info` as a card keeps it: under the model's own name, without a path of this machine."""
    return replace(info, name=info.own_name, origin=None)


_FIELDS = {"dtype": "stored", "texts": "prompts", "texts_sha256": "prompts"}
"""The fields of a request where they are called otherwise."""
_NOT_ASKED = ("info", "engine")


def other_capture(folder: Path, begun: CaptureCard, asked: CaptureCard) -> SteerError:
    """For a folder that holds `begun`, in which a capture as `asked` cannot go on."""
    found = list(begun.differences(asked))
    said = "; ".join(
        f"{name!r} is {_shown(here)} there, and {_shown(there)} is asked for"
        for name, here, there in found
    )
    name = found[0][0]
    return SteerError(
        f"{folder.name!r} holds another capture: {said}. Name another folder, or remove this one",
        param=None if name in _NOT_ASKED else f"/{_FIELDS.get(name, name)}",
        code="other_capture",
    )


def _shown(value: Any) -> str:
    if isinstance(value, ModelInfo):
        return f"{value.name} in {value.dtype}, {value.n_layers} layers of {value.d_model}"
    if isinstance(value, tuple):
        return ", ".join(one.key for one in value)
    if isinstance(value, Where):
        return value.model_dump_json(by_alias=True, exclude_none=True)
    return quoted(value, 80)


def shown(path: Path) -> str:
    """`path` in an error, which a client of a server may read."""
    return f"{path.parent.name}/{path.name}"


def read_card(folder: Path) -> CaptureCard | None:
    """The card of a folder; None where there is none. Raises `FileFormatError`."""
    path = folder / CARD
    try:
        return CaptureCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(
            f"{shown(path)} cannot be read: {error.strerror or error}", code="no_capture"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise FileFormatError(
            f"{shown(path)}: not what a capture writes: {at + ': ' if at else ''}{first['msg']}",
            code="invalid_capture",
        ) from error


def write_card(folder: Path, card: CaptureCard) -> None:
    """The card appears whole or not at all. Raises `StorageError`."""
    with disk_errors("keeping captured states"):
        staged = folder / f"{CARD}.part"
        staged.write_text(card.model_dump_json(indent=1, by_alias=True) + "\n", "utf-8")
        os.replace(staged, folder / CARD)
