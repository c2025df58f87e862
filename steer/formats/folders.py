"""Artefacts of several files: a folder, or an archive of one, told apart by the files in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steer.artefacts.artefact import Artefact
from steer.errors import FileFormatError
from steer.formats.adapters.peft import CONFIG as PEFT_CONFIG
from steer.formats.adapters.peft import ORACLE_CONFIG, SENDERS, WEIGHTS, is_peft, read_peft
from steer.formats.adapters.pyreft import PREFIX, is_pyreft, read_pyreft
from steer.formats.archive import ArchiveFormat, unpack
from steer.formats.guards.stand_ins import check_present
from steer.formats.lenses.jacobian_lens import is_jacobian_folder, read_jacobian_folder
from steer.formats.lenses.tuned_lens import CONFIG as LENS_CONFIG
from steer.formats.lenses.tuned_lens import PARAMETERS, read_tuned_lens
from steer.formats.options import ImportOptions
from steer.formats.saes.table import SAE_FOLDERS
from steer.formats.vectors.pt import DIRECTION, METADATA, read_refusal_direction


@dataclass(frozen=True)
class FolderLayout:
    """A folder layout: what tells it, the files it must have, and its reader.

    `sources` are what a sender may say with `from` of such a folder.
    """

    is_one: Callable[[Path], bool]
    needs: tuple[str, ...]
    read: Callable[[Path, ImportOptions], Artefact]
    sources: tuple[str, ...] = ()


LAYOUTS = (
    *(FolderLayout(one.is_one, one.needs, one.open) for one in SAE_FOLDERS),
    FolderLayout(
        lambda folder: (folder / METADATA).is_file(),
        (DIRECTION,),
        read_refusal_direction,
        ("refusal-direction",),
    ),
    FolderLayout(lambda folder: (folder / PARAMETERS).is_file(), (LENS_CONFIG,), read_tuned_lens),
    FolderLayout(is_jacobian_folder, (), read_jacobian_folder),
    FolderLayout(is_pyreft, (), read_pyreft, ("loreft", "direft")),
    FolderLayout(is_peft, (), read_peft, tuple(SENDERS)),
)
_KNOWN = (
    f"an SAE's folder of {', '.join(one.title for one in SAE_FOLDERS)}, a tuned lens "
    f"({LENS_CONFIG}, {PARAMETERS}), a Jacobian lens (…jacobian_lens….pt), a refusal direction "
    f"({DIRECTION}, {METADATA}), a pyreft "
    f"folder ({PREFIX}….bin, config.json) or an oracle of PEFT ({PEFT_CONFIG}, {WEIGHTS}, "
    f"{ORACLE_CONFIG})"
)


def unpacked(archive: Path, scratch: Path, *, format: ArchiveFormat, limit: int) -> Path:
    """The one folder with an artefact in an archive, unpacked to the new folder `scratch`."""
    unpack(archive, scratch, format=format, limit=limit)
    every = [scratch, *(path for path in sorted(scratch.rglob("*")) if path.is_dir())]
    folders = [folder for folder in every if is_artefact(folder)]
    if len(folders) != 1:
        held = ", ".join(str(folder.relative_to(scratch)) for folder in folders[:5])
        raise FileFormatError(
            f"the archive must hold one of: {_KNOWN}; it has "
            + (f"several: {held}" if folders else "none"),
            code="unknown_layout",
        )
    return folders[0]


def layout_of(folder: Path) -> FolderLayout:
    """The layout of a folder; raises `FileFormatError` for an unknown or incomplete one, and for
    files that only stand where others should."""
    for layout in LAYOUTS:
        if not layout.is_one(folder):
            continue
        for name in layout.needs:
            if not (folder / name).is_file():
                raise FileFormatError(
                    f"there is no {name} in the folder, which such a one has", code="unknown_layout"
                )
        for path in sorted(folder.iterdir()):
            if path.is_file():
                check_present(path)
        return layout
    raise FileFormatError(f"the folder is none of: {_KNOWN}", code="unknown_layout")


def is_artefact(folder: Path) -> bool:
    """Whether a folder is of a known layout, complete or not."""
    return any(layout.is_one(folder) for layout in LAYOUTS)
