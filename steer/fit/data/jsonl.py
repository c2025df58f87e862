"""JSON lines, read one at a time: the file is never in memory, and every error names its line.

What else people have their data in is read as the lines that it would be (`steer.fit.data.tables`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from steer.errors import FileFormatError
from steer.fit.data.tables import Columns, array_in, object_in, other_kind

_MARK = b"\xef\xbb\xbf"
"""The byte order mark that some editors and spreadsheets put in front of UTF-8."""

_KEYS = re.compile(r'"(\w+)":')
_COMMON = ("text", "label", "prompt")

Item = TypeVar("Item")


@dataclass(frozen=True)
class DataSet(Generic[Item]):
    """What a file holds, in order, and the hash of the file."""

    items: tuple[Item, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class LineReader:
    """Parses the lines of one file, the items of one array or object, or the rows of a table;
    `sha256` is of all its bytes, once they have been read.

    `what` names an item in errors, `shape` shows one, `code` is the errors' stable code.
    """

    path: Path
    what: str
    shape: str
    code: str
    _hash: Any = field(default_factory=hashlib.sha256)

    def read(self, parse: Callable[[Any, str], Item]) -> DataSet[Item]:
        """Every line through `parse`, which takes the JSON value and where it stands.

        Raises `FileFormatError` for a file that cannot be read, holds nothing, or has a bad line.
        """
        try:
            with self.path.open("rb") as file:
                return self.read_lines(file, parse)
        except OSError as error:
            raise FileFormatError(
                f"{str(self.path)!r} cannot be read: {error.strerror or error}",
                code="no_such_file",
            ) from error

    def read_lines(
        self, lines: Iterable[bytes], parse: Callable[[Any, str], Item]
    ) -> DataSet[Item]:
        """Lines that are already here; `path` only names them in errors."""
        items = [parse(value, at) for value, at in self._values(lines)]
        if not items:
            raise FileFormatError(
                f"{str(self.path)!r} holds no {self.what}s: write one {self.shape} per line",
                code=f"no_{self.what.split()[-1]}s",
            )
        return DataSet(tuple(items), self._hash.hexdigest())

    def read_bytes(self, data: bytes, parse: Callable[[Any, str], Item]) -> DataSet[Item]:
        """The lines of `data`."""
        return self.read_lines(io.BytesIO(data), parse)

    def _values(self, lines: Iterable[bytes]) -> Iterator[tuple[Any, str]]:
        """The values that are parsed, each with where it stands."""
        rest = self._hashed(lines)
        number, first = next(((n, one) for n, one in enumerate(rest, 1) if one.strip()), (0, b""))
        if not number:
            return
        at = f"{self.path}, line {number}"
        known = {*_COMMON, *_KEYS.findall(self.shape)}
        columns = Columns.of(first, known)
        with self._told(at, f"; needed is {self.shape} on each line, or an array or table of them"):
            items = array_in(first, rest, _loads)
            items = object_in(first, rest, _loads, known) if items is None else items
            value = _loads(first) if items is None and columns is None else None
        if items is not None:
            for place, item in enumerate(items, start=1):
                yield item, f"{self.path}, item {place}"
        elif columns is not None:
            yield from self._rows(columns, rest, number)
        else:
            yield value, at
            yield from self._lines(rest, number)

    def _hashed(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for place, line in enumerate(lines):
            self._hash.update(line)
            yield line if place else line.removeprefix(_MARK)

    def _lines(self, lines: Iterable[bytes], before: int) -> Iterator[tuple[Any, str]]:
        for number, line in enumerate(lines, start=before + 1):
            if line.strip():
                at = f"{self.path}, line {number}"
                with self._told(at):
                    value = _loads(line)
                yield value, at

    def _rows(
        self, columns: Columns, lines: Iterable[bytes], before: int
    ) -> Iterator[tuple[Any, str]]:
        rows, at = columns.rows(lines), before
        while True:
            with self._told(f"{self.path}, after line {at}"):
                found = next(rows, None)
            if found is None:
                return
            row, number = found
            at = before + number
            yield row, f"{self.path}, line {at}"

    @contextmanager
    def _told(self, at: str, needed: str = "") -> Iterator[None]:
        """Raises `FileFormatError` for what is no JSON, no table and no text, and says where."""
        try:
            yield
        except UnicodeDecodeError as error:
            why = other_kind(error.object) or f"not UTF-8 text: {error}"
            raise FileFormatError(f"{at}: {why}", code=self.code) from error
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{at}: {error}{needed}", code=self.code) from error


def _loads(line: bytes) -> Any:
    text = line.decode()
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def sha256_of(values: Sequence[Any]) -> str:
    """The hash of the file that holds `values`, one JSON value per line."""
    found = hashlib.sha256()
    for value in values:
        found.update((json.dumps(value, ensure_ascii=False) + "\n").encode())
    return found.hexdigest()


def check_keys(value: Any, keys: Sequence[str], at: str, what: str, code: str) -> dict[str, Any]:
    """`value` as an object with exactly `keys`; raises `FileFormatError` that lists what it has."""
    if not isinstance(value, dict) or set(value) != set(keys):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        named = ", ".join(map(repr, keys[:-1])) + f" and {keys[-1]!r}"
        raise FileFormatError(
            f"{at}: a {what} is an object with exactly the keys {named}; got {found!r}", code=code
        )
    return value
