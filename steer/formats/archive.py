"""Unpacking .zip, .tar and .tar.gz from strangers: plain files under one folder, bounded in size.

Refused are members that would land outside the folder, links, devices, encryption, and archives
whose directory alone would fill the memory. What a member declares about its size is not believed:
bytes are counted as they are written.
"""

from __future__ import annotations

import errno
import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Literal, TypeAlias

from steer.errors import FileFormatError, TooLarge
from steer.formats.guards.zip import MAX_DIRECTORY_BYTES, MAX_MEMBERS, check_directory

MAX_NAME = 512
_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_EXTENDED_HEADERS = (b"x", b"g", b"L", b"K")
_PLAIN_TYPES = (b"0", b"\0", b"5", *_EXTENDED_HEADERS)


ArchiveFormat: TypeAlias = Literal["zip", "tar", "tar.gz"]


def unpack(archive: Path, into: Path, *, format: ArchiveFormat, limit: int) -> None:
    """Writes the files of `archive` under the new folder `into`, at most `limit` bytes in all.

    Raises `FileFormatError` (`unsafe_archive`, `invalid_file`) or `TooLarge`
    (`archive_too_large`). `into` may hold some files then.
    """
    into.mkdir()
    budget = _Budget(limit)
    try:
        if format == "zip":
            _unpack_zip(archive, into, budget)
        elif format == "tar":
            _unpack_tar(archive, into, budget)
        else:
            plain = into.with_name(into.name + ".tar")
            try:
                _inflate(archive, plain, limit)
                _unpack_tar(plain, into, budget)
            finally:
                plain.unlink(missing_ok=True)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        gzip.BadGzipFile,
        NotImplementedError,
        UnicodeError,
        struct.error,
        ValueError,
        RuntimeError,
    ) as error:
        raise FileFormatError(f"the archive cannot be read: {error}") from error
    except OSError as error:
        # An offset before the file's beginning; anything else is our disk's fault, not the file's.
        if error.errno != errno.EINVAL:
            raise
        raise FileFormatError("the archive points outside of itself") from error


class _Budget:
    """Counts what has been written."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit

    def copy(self, source: IO[bytes], target: Path) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = target.open("xb")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise _unsafe(target.name, "has the path of another member") from None
        with stream:
            while chunk := source.read(_CHUNK):
                self._left -= len(chunk)
                if self._left < 0:
                    raise _too_large(self._limit)
                stream.write(chunk)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"the archive unpacks to more than the limit of {limit} bytes", code="archive_too_large"
    )


def _unpack_zip(archive: Path, into: Path, budget: _Budget) -> None:
    check_directory(archive)
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        _check_count(len(members))
        places = _Places(into)
        for member in members:
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _unsafe(member.filename, "is a link or a device")
            if member.flag_bits & 1:
                raise _unsafe(member.filename, "is encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _unsafe(member.filename, "is not stored or deflated")
            place = places.of(member.filename)
            if not member.filename.endswith(("/", "\\")):
                with file.open(member) as source:
                    budget.copy(source, place)


def _unpack_tar(archive: Path, into: Path, budget: _Budget) -> None:
    _check_tar_headers(archive)
    with tarfile.open(archive, mode="r:") as file:
        places = _Places(into)
        for member in file:
            place = places.of(member.name)
            source = file.extractfile(member) if member.isfile() else None
            if source is not None:
                with source:
                    budget.copy(source, place)


def _check_tar_headers(archive: Path) -> None:
    """Walks the headers alone: no links or devices, no extended header large enough to matter
    when tarfile reads it into memory."""
    members = 0
    size = archive.stat().st_size
    with archive.open("rb") as stream:
        while len(header := stream.read(_BLOCK)) == _BLOCK and header.strip(b"\0"):
            members += 1
            _check_count(members)
            kind, length = header[156:157], _tar_number(header[124:136])
            if kind not in _PLAIN_TYPES:
                raise _unsafe(
                    header[:100].rstrip(b"\0").decode(errors="replace"),
                    "is a link, a device or of another type than a plain file",
                )
            following = stream.tell() + -(-length // _BLOCK) * _BLOCK
            if kind in _EXTENDED_HEADERS:
                _check_extended(stream, length)
            stream.seek(following)
            if following > size:
                raise FileFormatError("the tar file is truncated", code="truncated_file")


def _check_extended(stream: IO[bytes], length: int) -> None:
    if length > MAX_DIRECTORY_BYTES:
        raise FileFormatError("a tar header is too large", code="unsafe_archive")
    # These would make tarfile find the next header somewhere else than this walk does.
    content = stream.read(length)
    if b"size=" in content or b"GNU.sparse" in content:
        raise FileFormatError(
            "a tar header overrules the size of its file, which is not read", code="unsafe_archive"
        )


def _tar_number(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():  # also the base-256 form, for files of 8 GiB and more
        raise FileFormatError(f"a tar header has the size {field!r}", code="unsafe_archive")
    return int(digits, 8)


def _inflate(source: Path, target: Path, limit: int) -> None:
    budget = _Budget(limit + MAX_MEMBERS * 4 * _BLOCK)
    with gzip.open(source, "rb") as stream:
        budget.copy(stream, target)  # type: ignore[arg-type]


def _check_count(count: int) -> None:
    if count > MAX_MEMBERS:
        raise FileFormatError(
            f"the archive has more than {MAX_MEMBERS} members", code="unsafe_archive"
        )


class _Places:
    """Where members go: under one folder."""

    def __init__(self, into: Path) -> None:
        self._into = into

    def of(self, name: str) -> Path:
        # Some programs on Windows write their own separators.
        parts = name.replace("\\", "/").rstrip("/").split("/")
        while parts and parts[0] == ".":
            parts = parts[1:]
        wrong = name.startswith(("/", "\\")) or ":" in name or "\0" in name
        if wrong or any(part in ("", ".", "..") for part in parts):
            raise _unsafe(name, "has a path that leads out of the archive")
        if len(name) > MAX_NAME or len(parts) > 16 or max(map(len, parts), default=0) > 200:
            raise _unsafe(name, "has too long a path")
        return self._into.joinpath(*parts)


def _unsafe(name: str, why: str) -> FileFormatError:
    shown = name if len(name) <= 80 else name[:79] + "…"
    return FileFormatError(
        f"the archive's member {shown!r} {why}: pack plain files with relative names",
        code="unsafe_archive",
    )
