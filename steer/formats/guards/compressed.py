"""Files that were compressed as a whole, as joblib and gzip do."""

from __future__ import annotations

import bz2
import lzma
import zlib
from pathlib import Path
from typing import Protocol

from steer.errors import FileFormatError, TooLarge

_EITHER_HEADER = zlib.MAX_WBITS | 32
_ZLIB_STARTS = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_LZ4 = b"\x04\x22\x4d\x18"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def read_plain(path: Path, limit: int) -> bytes:
    """The bytes of a file, decompressed if zlib, gzip, bzip2, xz or lzma compressed them.

    Raises `TooLarge` beyond `limit`, `FileFormatError` for damaged files and for lz4.
    """
    data = path.read_bytes()
    if data.startswith(_LZ4):
        raise FileFormatError(
            "the file is compressed by lz4, which is not read: decompress it, or save it anew "
            "without (joblib.dump(…, compress=0))"
        )
    decompressor = _decompressor(data)
    if decompressor is None:
        return data
    try:
        plain = decompressor.decompress(data, limit + 1)
    except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
        raise FileFormatError(f"the compressed file is damaged: {error}") from error
    if len(plain) > limit:
        raise TooLarge(f"the file has more than {limit} bytes when it is decompressed")
    if not decompressor.eof:
        raise FileFormatError("the compressed file ends before its time", code="truncated_file")
    return plain


def _decompressor(data: bytes) -> _Decompressor | None:
    if data.startswith((b"\x1f\x8b", *_ZLIB_STARTS)):
        return zlib.decompressobj(_EITHER_HEADER)
    if data.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    if data.startswith((b"\xfd7zXZ", b"\x5d\x00\x00")):
        return lzma.LZMADecompressor()
    return None
