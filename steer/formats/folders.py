"""Artefacts of several files: a folder, or an archive of one, told apart by the files in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steer.artefacts.artefact import Artefact
from steer.artefacts.sae.saelens import CONFIG, WEIGHTS
from steer.errors import FileFormatError
from steer.formats.archive import ArchiveFormat, unpack
from steer.formats.lenses.tuned_lens import CONFIG as LENS_CONFIG
from steer.formats.lenses.tuned_lens import PARAMETERS, read_tuned_lens
from steer.formats.saes.saelens_folder import read_saelens
from steer.formats.vectors.pt import DIRECTION, METADATA, read_refusal_direction


@dataclass(frozen=True)
class FolderLayout:
    """A folder layout: a file that tells it, the one with the numbers, and its reader."""

    tells: str
    weights: str
    read: Callable[[Path], Artefact]


LAYOUTS = (
    FolderLayout(CONFIG, WEIGHTS, read_saelens),
    FolderLayout(METADATA, DIRECTION, read_refusal_direction),
    FolderLayout(PARAMETERS, LENS_CONFIG, read_tuned_lens),
)
_KNOWN = (
    f"a SAELens folder ({CONFIG}, {WEIGHTS}), a tuned lens ({LENS_CONFIG}, {PARAMETERS}) or a "
    f"refusal direction ({DIRECTION}, {METADATA})"
)


def unpacked(archive: Path, scratch: Path, *, format: ArchiveFormat, limit: int) -> Path:
    """The one folder with an artefact in an archive, unpacked to the new folder `scratch`."""
    unpack(archive, scratch, format=format, limit=limit)
    told = {layout.tells for layout in LAYOUTS}
    folders = sorted({path.parent for path in scratch.rglob("*") if path.name in told})
    if len(folders) != 1:
        held = ", ".join(str(folder.relative_to(scratch)) for folder in folders[:5])
        raise FileFormatError(
            f"the archive must hold one of: {_KNOWN}; it has "
            + (f"several: {held}" if folders else "none"),
            code="unknown_layout",
        )
    return folders[0]


def layout_of(folder: Path) -> FolderLayout:
    """The layout of a folder; raises `FileFormatError` for an unknown or incomplete one."""
    for layout in LAYOUTS:
        if (folder / layout.tells).is_file():
            if not (folder / layout.weights).is_file():
                raise FileFormatError(
                    f"there is no {layout.weights} beside {layout.tells}", code="unknown_layout"
                )
            return layout
    raise FileFormatError(f"the folder is none of: {_KNOWN}", code="unknown_layout")
