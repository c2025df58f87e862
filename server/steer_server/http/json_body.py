"""JSON bodies: parsed with bounds, and checked beside the event loop.

FastAPI parses and validates a body on the event loop, where megabytes of it would hold up every
other request. A `JSONBodyRequest` brings the finished model instead, made in a worker thread.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Protocol

import pydantic_core
from anyio import to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError

MAX_DEPTH = 200
"""Lists and objects inside each other; the bound of pydantic's own parser."""

MAX_KEYS = 1024
"""Keys of one object: each that is unknown is an error of its own."""

MAX_CONTAINERS = 1 << 19
"""Lists and objects in all, brackets in texts counted with them: the interpreter makes them in one
go, and holds everything else up for a microsecond each."""

SMALL = 16 << 10
"""Bytes of a body that are parsed and checked faster than a thread takes over."""


class BodyField(Protocol):
    """What FastAPI keeps of a route's body; `validate` answers the value and the errors."""

    def validate(self, value: Any, *, loc: tuple[str, ...]) -> tuple[Any, list[Any]]: ...


class JSONBodyRequest(Request):
    """A request whose body has been read: FastAPI finds the validated model in place of JSON.

    Assumes: pydantic takes an instance of a model as it is.
    """

    def __init__(self, request: Request, data: bytes, model: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._data, self._model = data, model

    async def body(self) -> bytes:
        return self._data

    async def json(self) -> Any:
        return self._model


async def read_body(request: Request, field: BodyField) -> Request:
    """The request with its JSON body parsed and validated; as it is where there is none.

    Raises `RequestValidationError` for what is wrong with the body.
    """
    if not is_json(request):
        return request
    data = await request.body()
    if not data:
        return request
    if len(data) <= SMALL:
        return JSONBodyRequest(request, data, _validated(data, field))
    return JSONBodyRequest(request, data, await to_thread.run_sync(_validated, data, field))


def is_json(request: Request) -> bool:
    """Whether the request says that its body is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json"


def parse_json(data: bytes) -> Any:
    """The value of a body; raises `RequestValidationError` for what `bounded_json` refuses."""
    try:
        return bounded_json(data)
    except ValueError as error:
        raise _invalid(str(error)) from None


def bounded_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises `ValueError` where it is none, nests deeper than `MAX_DEPTH`, or has an object with a key
    twice or with more than `MAX_KEYS`, or more than `MAX_CONTAINERS` in all.
    """
    opened = data.count(b"[") + data.count(b"{")
    if opened > MAX_CONTAINERS:
        raise ValueError(
            f"it opens {opened} lists and objects, and at most {MAX_CONTAINERS} are read"
        )
    if opened > MAX_DEPTH:
        # Python's parser has no bound of its own: it ends where the interpreter's stack does.
        _check_depth(data)
    return json.loads(data.decode("utf-8"), object_pairs_hook=_object)


def _check_depth(data: bytes) -> None:
    try:
        pydantic_core.from_json(data)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels") from None
        raise


def _validated(data: bytes, field: BodyField) -> Any:
    value = parse_json(data)
    model, errors = field.validate(value, loc=("body",))
    if errors:
        raise RequestValidationError(errors, body=value)
    return model


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys, and at most {MAX_KEYS} are read")
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} is there twice in one object")
    return made


def _invalid(reason: str) -> RequestValidationError:
    """As FastAPI says it of JSON that is broken, so that every application knows its form."""
    return RequestValidationError(
        [
            {
                "type": "json_invalid",
                "loc": ("body", 0),
                "msg": "JSON decode error",
                "input": {},
                "ctx": {"error": reason},
            }
        ]
    )
