"""Multipart uploads, parsed while they arrive: no part of a file is kept in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from anyio import to_thread
from fastapi import Request
from pydantic import TypeAdapter
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from steer.errors import SteerError, TooLarge, pointer
from steer.model import parse_layers
from steer.registry.blobs.staging import Upload
from steer.registry.registry import Registry
from steer.spec import SITES, StoredName

LAYERS_FIELD = {
    "type": "string",
    "pattern": r"^\d{1,3}(-\d{1,3})?(,\d{1,3}(-\d{1,3})?)*$",
    "description": "4-6 or 4,5,6 (or [4, 5, 6])",
}
IMPORT_FIELDS = {
    "name": TypeAdapter(StoredName).json_schema(),
    "layer_offset": {"type": "integer", "minimum": -1024, "maximum": 1024},
    "position": {"type": "integer", "minimum": -(1 << 20), "maximum": (1 << 20) - 1},
    "site": {"type": "string", "enum": list(SITES)},
    "experiment": {"type": "string"},
    "strength": {"type": "number"},
    "description": {"type": "string"},
    "licence": {"type": "string"},
    "model": {
        "type": "string",
        "description": "The model it is for; one that is not for the served model says so here",
    },
}
"""What may be said of a file, beside its layers, in whatever form it comes."""

MAX_FILES = 8
MAX_FIELDS = 32
MAX_FIELD_BYTES = 64 << 10


@dataclass
class Received:
    """What an upload held: form fields as text, and files with the names their sender gave."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, Upload]] = field(default_factory=list)

    @property
    def stem(self) -> str:
        """The first file's name without its suffix."""
        return PurePosixPath(self.files[0][0].replace("\\", "/")).stem

    @contextmanager
    def path(self) -> Iterator[Path]:
        """The file, or where there are several a folder with all of them under their names."""
        if len(self.files) == 1:
            yield self.files[0][1].path
            return
        with tempfile.TemporaryDirectory(dir=self.files[0][1].path.parent) as folder:
            for name, upload in self.files:
                shutil.move(upload.path, Path(folder) / name)
            yield Path(folder)


def form_layers(text: str) -> tuple[int, ...]:
    """The form's `layers`: as on the command line, or in the brackets of JSON."""
    plain = text.strip()
    if plain.startswith("[") and plain.endswith("]"):
        plain = plain[1:-1]
    return parse_layers(plain)


async def receive(
    request: Request, registry: Registry, stack: ExitStack, *, limit: int
) -> Received:
    """Reads the body into `Received`, whose files last as long as `stack` is open.

    Raises `TooLarge` as soon as all files together pass `limit` bytes, and `SteerError`
    (`invalid_multipart`) for a body that is not multipart or ends early.
    """
    parts, boundary = _Parts(registry, stack, limit), _boundary(request)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            # Parsing writes the file's bytes to disk, so it happens in a worker thread.
            await to_thread.run_sync(parser.write, chunk)
        parser.finalize()
    except FormParserError as error:
        raise _malformed(f"the multipart body is malformed: {error}") from error
    return parts.finished()


class _Parts:
    """The parser's callbacks: sorts bytes into fields and files as they come."""

    def __init__(self, registry: Registry, stack: ExitStack, limit: int) -> None:
        self._registry, self._stack, self._limit = registry, stack, limit
        self._received = Received()
        self._size = 0
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._headers: dict[str, str] = {}
        self._name = ""
        self._value: bytearray | None = None
        self._upload: Upload | None = None
        self._complete = False

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def finished(self) -> Received:
        if not self._complete:
            raise _malformed("the body ends before its last boundary: send it again, whole")
        if not self._received.files:
            raise SteerError(
                "the upload has no part named 'file'", param="/file", code="missing_file"
            )
        return self._received

    def _begin(self) -> None:
        self._headers, self._value, self._upload = {}, None, None

    def _header_end(self) -> None:
        name, value = (part.decode("latin-1") for part in self._header)
        self._headers[name.lower()] = value
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name != "file":
            if len(self._received.fields) >= MAX_FIELDS:
                raise _malformed(f"an upload has at most {MAX_FIELDS} fields")
            self._value = bytearray()
            return
        if len(self._received.files) >= MAX_FILES:
            raise _malformed(f"an upload has at most {MAX_FILES} files")
        filename = options.get(b"filename", b"").decode(errors="replace")
        self._upload = self._stack.enter_context(self._registry.upload())
        self._received.files.append((self._checked(filename), self._upload))

    def _checked(self, filename: str) -> str:
        """The name, which becomes a file's name only where a folder is uploaded file by file."""
        taken = {name for name, _ in self._received.files}
        plain = filename == PurePosixPath(filename).name and filename not in ("", ".", "..")
        if taken and (not plain or filename in taken or "\0" in filename):
            raise SteerError(
                f"{filename!r} cannot be one of several files: give them plain, different names",
                param="/file",
                code="invalid_filename",
            )
        return filename or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._upload is not None:
            if self._size > self._limit:
                raise TooLarge(
                    f"the upload is larger than the limit of {self._limit} bytes: send a smaller "
                    "file, or raise the server's upload limit",
                    param="/file",
                    code="upload_too_large",
                )
            self._upload.write(data[start:end])
        elif self._value is not None:
            if len(self._value) + end - start > MAX_FIELD_BYTES:
                raise TooLarge(
                    f"the field {self._name!r} is longer than {MAX_FIELD_BYTES} bytes",
                    param=pointer(self._name),
                )
            self._value.extend(data[start:end])

    def _part_end(self) -> None:
        if self._value is not None:
            try:
                self._received.fields[self._name] = self._value.decode()
            except UnicodeDecodeError as error:
                raise SteerError(
                    f"the field {self._name!r} is not UTF-8",
                    param=pointer(self._name),
                    code="invalid_value",
                ) from error

    def _end(self) -> None:
        self._complete = True


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise HTTPException(
            415,
            "uploads are multipart/form-data with a part named 'file': curl -F file=@vector.gguf …",
        )
    boundary = options.get(b"boundary")
    if not boundary:
        raise _malformed("the content type names no boundary")
    return boundary


def _malformed(message: str) -> SteerError:
    return SteerError(message, code="invalid_multipart")
