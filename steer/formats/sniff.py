"""What a file is, from its first bytes; its name is never believed."""

from __future__ import annotations

from pathlib import Path

from steer.errors import FileFormatError
from steer.formats.guards.stand_ins import START_BYTES, check_start
from steer.formats.table import FORMATS, is_zip

_FOREIGN = {
    b"\xfd7zXZ": "an xz archive: send .zip or .tar.gz",
    b"BZh": "a bzip2 archive: send .zip or .tar.gz",
    b"\x28\xb5\x2f\xfd": "a zstd archive: send .zip or .tar.gz",
}
PICKLE = (
    "the file is a Python pickle, which can run code when it is opened and is never read: save its "
    "tensors with torch.save (a dictionary of tensors, in the zip form) or with "
    "safetensors.torch.save_file; pickles of the steering-vectors package, of linear probes of "
    "scikit-learn, of tensors and of NumPy arrays are turned into safetensors on your own machine "
    "by `steer vectors convert`"
)


def sniff(path: Path) -> str:
    """The format of the file at `path`: one of `FORMATS`, "safetensors", or an archive ("zip",
    "tar", "tar.gz").

    Raises `FileFormatError`: `empty_file`, `lfs_pointer`, `web_page`, `pickle_refused`, or
    `unknown_format` with what the file seems to be.
    """
    with path.open("rb") as stream:
        start = stream.read(START_BYTES)
    if not start:
        raise FileFormatError("the file is empty: download or write it again", code="empty_file")
    check_start(start)
    for format in FORMATS:
        if format.is_one(path, start):
            return format.name
    if is_zip(start):
        return "zip"
    if start.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if start[257:262] == b"ustar":
        return "tar"
    if _is_pickle(start):
        raise FileFormatError(PICKLE, code="pickle_refused")
    # A safetensors file is a length in 8 bytes and then a JSON object.
    if start[8:9] == b"{":
        return "safetensors"
    seems = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)
    raise FileFormatError(
        f"the file is {seems or 'of no known format'}; known are safetensors, "
        f"{', '.join(format.title for format in FORMATS)}, and folders of SAELens, tuned-lens, "
        "jacobian-lens, refusal_direction or pyreft as .zip, .tar or .tar.gz",
        code="unknown_format",
    )


def _is_pickle(start: bytes) -> bool:
    # PROTO, a protocol from 2 to 5, then an opcode; a safetensors length may begin alike, but has
    # "{" in its ninth byte.
    framed = len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5
    return framed and not (start[8:9] == b"{" and start[4:8] == b"\0\0\0\0")
