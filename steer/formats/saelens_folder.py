"""SAELens folders, as they are or in an archive: `cfg.json`, `sae_weights.safetensors`, and more.

What the files mean is known to `steer.sae.saelens`; this module finds them and checks that they
may be opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from steer.errors import FileFormatError
from steer.formats.archive import unpack
from steer.formats.safetensors_file import SafetensorsFile
from steer.sae.base import SAE
from steer.sae.saelens import CONFIG, WEIGHTS, load_directory

MAX_JSON_BYTES = 32 << 20


def read_archive(
    archive: Path, scratch: Path, *, format: Literal["zip", "tar", "tar.gz"], limit: int
) -> SAE:
    """The SAE in an archive of one SAELens folder, unpacked to the new folder `scratch`."""
    unpack(archive, scratch, format=format, limit=limit)
    folders = sorted(path.parent for path in scratch.rglob(CONFIG))
    if len(folders) != 1:
        held = ", ".join(str(folder.relative_to(scratch)) for folder in folders[:5])
        raise FileFormatError(
            f"the archive must hold one folder with {CONFIG} and {WEIGHTS}; it has "
            + (f"several: {held}" if folders else f"no {CONFIG}"),
            code="unknown_layout",
        )
    return read_folder(folders[0])


def read_folder(folder: Path) -> SAE:
    """The SAE in a SAELens folder."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileFormatError(f"there is no {WEIGHTS} beside {CONFIG}", code="unknown_layout")
    SafetensorsFile.open(weights)
    for path in folder.glob("*.json"):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        return load_directory(folder)
    except FileFormatError as error:
        # The sender knows nothing of the folder it was unpacked to.
        error.message = error.message.replace(f"{folder}/", "").replace(str(folder), "the folder")
        error.args = (error.message,)
        raise
