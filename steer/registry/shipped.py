"""Artefacts that come with the software: a folder, offered to the registry at every start."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from steer.artefacts.kinds import KINDS
from steer.errors import FileFormatError
from steer.formats.folders import is_artefact
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.registry.entry import Entry
from steer.registry.profiles import Profile
from steer.registry.registry import Registry

PARTS = (*(row.shelf for row in KINDS), "relations")
_UNPACKED_LIMIT = 1 << 30


def add_library(registry: Registry, folder: Path) -> list[Entry]:
    """Registers every artefact under `folder`; the entries that are new.

    `<part>/<name>.safetensors` are single files in each of `PARTS`, `<part>/<name>/` folders of a
    known layout (SAELens, tuned lens); `profiles/<name>.json` hold a spec and its description.
    Content that has had its name before is left as it is now, so that users may replace or remove
    what was shipped. Profiles are stored where none of their name serves the model that the
    registry is read for.
    """
    if not folder.is_dir():
        raise FileFormatError(f"{str(folder)!r} is not a folder of artefacts", code="no_library")
    parts = [folder / part for part in PARTS]
    files = [path for part in parts for path in (*_files(part), *_folders(part))]
    added = [_add_artefact(registry, path) for path in files]
    held = {profile.name for profile in registry.profiles()}
    for path in sorted((folder / "profiles").glob("*.json")):
        profile = _read_profile(path)
        if profile.name not in held:
            registry.put_profile(profile)
    return [entry for entry in added if entry is not None]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/") if is_artefact(path))


def _add_artefact(registry: Registry, path: Path) -> Entry | None:
    # No scratch folder: nothing shipped is an archive.
    artefact = read_artefact(path, ImportOptions(), scratch=None, unpacked_limit=_UNPACKED_LIMIT)
    name = path.name if path.is_dir() else path.stem
    return registry.add_shipped(name, artefact)


def _read_profile(path: Path) -> Profile:
    try:
        return Profile.model_validate({"name": path.stem, **json.loads(path.read_text())})
    except (ValidationError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path.name} is not a profile: {error}") from error
