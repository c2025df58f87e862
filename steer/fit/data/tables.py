"""Data that is no JSON lines, as people have it: one JSON array, an object of lists, and tables of
spreadsheets (CSV).

All become the values that JSON lines would have held.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_ARRAY_BYTES = 256 << 20
_DELIMITERS = "\t;,"
_OTHERS = (
    (b"PAR1", "a Parquet file: pandas.read_parquet(…).to_json(…, orient='records', lines=True)"),
    (b"\x1f\x8b", "compressed by gzip: gunzip it"),
    (b"PK\x03\x04", "a zip file or a workbook: unpack it, or save the sheet as CSV"),
    (b"\xff\xfe", "in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "in UTF-16: save it as UTF-8"),
)


def other_kind(start: bytes) -> str | None:
    """What a file is that begins so and is no text, and what to do about it."""
    return next((what for magic, what in _OTHERS if start.startswith(magic)), None)


def array_in(
    first: bytes, rest: Iterable[bytes], loads: Callable[[bytes], Any]
) -> list[Any] | None:
    """The items of a file that is one JSON array, on one line or on many, given its first line and
    an iterator of those behind it; None where each line is a value, and nothing of `rest` is used.

    A line with a chat, which is an array of messages, is a value. Raises `ValueError`.
    """
    if not first.lstrip().startswith(b"["):
        return None
    try:
        value = loads(first)
    except ValueError:
        value = loads(_joined(first, rest))
        return [value] if is_chat(value) else list(value)
    if is_chat(value):
        return None
    if any(line.strip() for line in rest):
        raise ValueError("an array that is no chat, with more lines behind it")
    return list(value)


def object_in(
    first: bytes, rest: Iterable[bytes], loads: Callable[[bytes], Any], known: Collection[str]
) -> list[Any] | None:
    """The items of a file that is one JSON object, given its first line and an iterator of those
    behind it: of columns, `{"text": [..], "label": [..]}`; of one array of items under a name that
    is not among those `known` of an item; or itself one item, on many lines. None where each line
    is a value, and nothing of `rest` is used.

    Raises `ValueError`.
    """
    if not first.lstrip().startswith(b"{"):
        return None
    try:
        value = loads(first)
    except ValueError as broken:
        try:
            value = loads(_joined(first, rest))
        except ValueError:
            raise broken from None
        items = _items_of(value, known)
        return [value] if items is None else items
    items = _items_of(value, known)
    if items is not None and any(line.strip() for line in rest):
        raise ValueError("an object of lists, with more lines behind it")
    return items


def _items_of(value: dict[str, Any], known: Collection[str]) -> list[Any] | None:
    """The items of an object of lists; None where it is an item itself."""
    columns = list(value.values())
    if not columns or not all(_is_column(name, one) for name, one in value.items()):
        return None
    if len(value) == 1 and not set(value) & set(known):
        return list(columns[0])
    if len({len(one) for one in columns}) > 1:
        sizes = ", ".join(f"{len(one)} of {name!r}" for name, one in value.items())
        raise ValueError(f"an object of lists has as many items in each; got {sizes}")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _is_column(name: str, value: Any) -> bool:
    """Whether a field holds many items' values: not a chat of one, and not the token ids of one."""
    if not isinstance(value, list) or is_chat(value):
        return False
    return name != "tokens" or any(isinstance(one, list) for one in value)


def _joined(first: bytes, rest: Iterable[bytes]) -> bytes:
    pieces, size = [first], len(first)
    for line in rest:
        pieces.append(line)
        size += len(line)
        if size > MAX_ARRAY_BYTES:
            raise ValueError(f"an array of more than {MAX_ARRAY_BYTES} bytes")
    return b"".join(pieces)


def is_chat(value: list[Any]) -> bool:
    """Whether a list is the messages of one chat, and not items."""
    return bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


@dataclass(frozen=True)
class Columns:
    """The first line of a table: the names of its columns, "" for one without, such as that of
    pandas' row numbers; and what stands between them."""

    names: tuple[str, ...]
    delimiter: str

    @staticmethod
    def of(line: bytes, known: Collection[str]) -> Columns | None:
        """Those of a line, or None where it does not name at least two columns, with one of `known`
        among them."""
        try:
            text = line.decode().strip("\r\n")
        except UnicodeDecodeError:
            return None
        delimiter = next((one for one in _DELIMITERS if one in text), None)
        if delimiter is None:
            return None
        names = [one.strip() for one in next(csv.reader([text], delimiter=delimiter))]
        named = [one for one in names if one]
        if not len(set(named)) == len(named) > 1 or not set(named) & set(known):
            return None
        return Columns(tuple(names), delimiter)

    def rows(self, lines: Iterable[bytes]) -> Iterator[tuple[dict[str, str], int]]:
        """Objects of the cells that hold something, each with the number of its last line; a cell
        in quotation marks may go over several lines. Raises `ValueError`."""
        reader = csv.reader((line.decode() for line in lines), delimiter=self.delimiter)
        try:
            for cells in reader:
                if len(cells) > len(self.names):
                    raise ValueError(
                        f"{len(cells)} cells under {len(self.names)} names: put those that hold "
                        f"{self.delimiter!r} in quotation marks"
                    )
                found = dict(zip(self.names, cells, strict=False))
                row = {name: cell for name, cell in found.items() if name and cell}
                if row:
                    yield row, reader.line_num
        except csv.Error as error:
            raise ValueError(str(error)) from error
