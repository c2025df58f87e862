"""What is checked of a zip file's directory before any reader of zip files opens it."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

from steer.artefacts.sae.storage.file_arrays import ByteSource
from steer.errors import FileFormatError

MAX_MEMBERS = 1024
MAX_DIRECTORY_BYTES = 1 << 20
_LOCAL = b"PK\x03\x04"
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES, _LOCAL_BYTES = 22, 56, 20, 30
_LONGEST_COMMENT = 1 << 16
UNREADABLE = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
    struct.error,
    ValueError,
    EOFError,
)
"""What Python's zipfile raises for a damaged file, besides `OSError` and `zlib.error`."""


class _End(NamedTuple):
    """The end of a zip file: where it begins, and the length of the directory before it."""

    place: int
    directory_bytes: int
    is_zip64: bool
    has_comment: bool


def check_directory(path: Path) -> None:
    """Refuses a zip whose directory is large or in the zip64 form, before zipfile reads it."""
    end = _find_end(path)
    if end.is_zip64 or end.directory_bytes > MAX_DIRECTORY_BYTES:
        raise FileFormatError(
            "the zip file's directory is in the zip64 form or larger than an artefact can need: "
            "pack it as a plain .zip or as .tar.gz",
            code="unsafe_archive",
        )


def member_names(path: Path) -> list[str]:
    """The members' names, of a zip whose directory is small (zip64 or not)."""
    end = _find_end(path)
    if end.directory_bytes > MAX_DIRECTORY_BYTES:
        raise FileFormatError(
            f"the zip file's directory has {end.directory_bytes} bytes; at most "
            f"{MAX_DIRECTORY_BYTES} are read",
            code="unsafe_archive",
        )
    try:
        with zipfile.ZipFile(path) as file:
            return file.namelist()
    except (*UNREADABLE, OSError) as error:
        raise FileFormatError(f"the zip file cannot be read: {error}") from error


def stored_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip that only stores: nothing deflated, encrypted, linked or overlapping.

    That is how `torch.save` writes. Two readers find the same directory in it: it has no comment,
    so its end is the end of the file. Raises `FileFormatError`.
    """
    names = member_names(path)
    if _find_end(path).has_comment or len(names) > MAX_MEMBERS or len(set(names)) != len(names):
        raise _unsafe("it has a comment, more than 1024 members, or two of one name")
    with zipfile.ZipFile(path) as file:
        members = {member.filename: member for member in file.infolist()}
    end = 0
    for member in sorted(members.values(), key=lambda one: one.header_offset):
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _unsafe(f"{member.filename[:80]!r} is compressed or encrypted")
        if member.compress_size != member.file_size or member.header_offset < end:
            raise _unsafe(f"{member.filename[:80]!r} has two sizes or overlaps another member")
        end = member.header_offset + _LOCAL_BYTES + member.file_size
    if end > path.stat().st_size:
        raise FileFormatError("the zip file is truncated", code="truncated_file")
    return members


def data_offset(source: ByteSource, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin; raises `FileFormatError` where they would not be
    inside the file."""
    local = bytearray(_LOCAL_BYTES)
    whole = source.read_into(memoryview(local), member.header_offset) == _LOCAL_BYTES
    name, extra = struct.unpack("<HH", local[26:30])
    start: int = member.header_offset + _LOCAL_BYTES + name + extra
    if not whole or not local.startswith(_LOCAL) or start + member.file_size > source.size:
        raise FileFormatError(
            f"the member {member.filename[:80]!r} lies outside of the file: it is truncated",
            code="truncated_file",
        )
    return start


def _unsafe(why: str) -> FileFormatError:
    return FileFormatError(
        f"the zip file is not as torch.save writes: {why}", code="unsafe_archive"
    )


def _find_end(path: Path) -> _End:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = max(0, size - _LONGEST_COMMENT - _END_BYTES - _LOCATOR_BYTES)
        stream.seek(start)
        tail = stream.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) - place < _END_BYTES:
            raise FileFormatError("the zip file has no end: it is truncated", code="truncated_file")
        (directory,) = struct.unpack("<I", tail[place + 12 : place + 16])
        has_comment = len(tail) - place != _END_BYTES
        locator = tail[max(0, place - _LOCATOR_BYTES) : place]
        if not locator.startswith(_LOCATOR):
            return _End(start + place, directory, False, has_comment)
        (at,) = struct.unpack("<Q", locator[8:16])
        if at + _END64_BYTES > size:
            raise FileFormatError("the zip file points outside of itself", code="truncated_file")
        stream.seek(at)
        record = stream.read(_END64_BYTES)
    if not record.startswith(_END64):
        raise FileFormatError("the zip file's zip64 directory is not where it says")
    (directory,) = struct.unpack("<Q", record[40:48])
    return _End(at, directory, True, has_comment)
