"""The OpenAPI document: what FastAPI reads off the routes, and what it cannot know of them.

That is how errors look and which there are, and the key. FastAPI's own 422 is never answered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

Operation = dict[str, Any]

_NEVER = ("HTTPValidationError", "ValidationError")
"""Schemas of errors that no route answers."""

_NAME = "SteerError"

_MEANINGS = {
    400: "Something is wrong with the request; `code` and `param` say what and where",
    401: "The server has a key, and the request has not",
    403: "The server has no key, and takes no requests of this page or for this host",
    404: "What the address names, or the model, does not exist",
    408: "The rest of the body did not come",
    409: "Something refers to the present state, or the name is taken",
    413: "The body, a file or what is asked for is larger than a limit",
    415: "The content type is not one that this route reads",
    500: "The server failed; the request may be tried again",
    503: "No room at the moment, or the server is shutting down: try again later",
}

_ERROR = {
    "type": "object",
    "description": "An error, in OpenAI's form. docs/http.md lists the codes.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {
                "message": {"type": "string", "description": "What, where, and what to do"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "code": {"type": "string", "description": "Stable, for programs"},
                "param": {
                    "type": ["string", "null"],
                    "description": "A JSON pointer into the request",
                },
            },
        }
    },
}
_RETRY = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "string"}}}

_NAMES = re.compile(r"/v1/(chat/|completions|responses)")
"""Requests to these name a model; other names in a body are fields, and wrong ones are 400."""

_CONFLICTS = (
    ("delete", re.compile(r"/v1/(jobs/\{|steering/)")),
    ("put", re.compile(r"/v1/steering/aliases/")),
    ("post", re.compile(r"/v1/steering/(?!validate|profiles)|/v1/jobs/\{")),
)

_BUSY = re.compile(
    r"/v1/(chat/|completions|responses|inspect/|steering/(fit|import|sweep|cal|eval))"
)


def document(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """The document of Steer's own server; `needs_key` says whether it asks for a key."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = made["components"]["schemas"]
        for name in _NEVER:
            schemas.pop(name, None)
        complete(made, needs_key=needs_key)
        app.openapi_schema = made
    return app.openapi_schema


def complete(
    made: dict[str, Any], *, needs_key: bool, ours: Callable[[str], bool] = lambda _: True
) -> None:
    """Adds what FastAPI cannot know of the operations, at the paths that are `ours`."""
    parts = made.setdefault("components", {})
    parts.setdefault("schemas", {})[_NAME] = _ERROR
    parts.setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
    for path, operations in made["paths"].items():
        if ours(path):
            for method, operation in operations.items():
                _complete(operation, path, method, needs_key)


def _complete(operation: Operation, path: str, method: str, needs_key: bool) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    for status in _errors(operation, path, method):
        answers.setdefault(str(status), _answer(status))
    if path.startswith("/v1"):
        answers |= {"401": _answer(401), "403": _answer(403)}
        operation["security"] = [{"key": []}] if needs_key else [{}, {"key": []}]


def _errors(operation: Operation, path: str, method: str) -> Iterator[int]:
    """The statuses with which this operation may refuse a request, or fail."""
    body = "requestBody" in operation
    if body or operation.get("parameters"):
        yield 400
    if "{" in path or (body and _NAMES.match(path)):
        yield 404
    if any(method == changing and place.match(path) for changing, place in _CONFLICTS):
        yield 409
    if body:
        yield from (408, 413, 415)
    yield 500
    if _BUSY.match(path):
        yield 503


def _answer(status: int) -> Mapping[str, Any]:
    answer: dict[str, Any] = {
        "description": _MEANINGS[status],
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{_NAME}"}}},
    }
    return {**answer, "headers": _RETRY} if status == 503 else answer
