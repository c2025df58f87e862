"""Every error as OpenAI's body, `{"error": {"message", "type", "code", "param"}}`, and in it the id
of the request."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from steer.errors import SteerError, clipped, clipped_pointer, pointer, quoted
from steer.spec.wording import in_json_words, numbered_from_end
from steer_server.http.field_names import body_model, unknown_field
from steer_server.http.request_id import HEADER, request_id

log = logging.getLogger("steer.server")

_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}


def error_body(message: str, *, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; its `type` follows from the HTTP status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    said, at = clipped(message), clipped_pointer(param)
    error = {"message": said, "type": kind, "code": code, "param": at}
    return {"error": error if request_id() is None else {**error, "request_id": request_id()}}


def error_response(
    message: str,
    *,
    status: int,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as a response. ASCII JSON, so that any string a client sent can be quoted."""
    body = error_body(message, status=status, code=code, param=param)
    return Response(json.dumps(body), status, headers, media_type="application/json")


def refuse(
    scope: Scope,
    message: str,
    *,
    status: int,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error that a middleware answers, counted like those of routes."""
    note(scope, code)
    return error_response(message, status=status, code=code, param=param, headers=headers)


def note(scope: Scope, code: str) -> None:
    """Counts an error, and leaves its code to the access log."""
    scope.setdefault("state", {})["error_code"] = code
    serving = getattr(scope["app"].state, "steer", None) if "app" in scope else None
    if serving is not None:
        serving.metrics.rejects.labels(code=code).inc()


def for_this_model(message: str, scope: Scope) -> str:
    """`message` with what a model's number of layers makes of a layer counted from its end."""
    serving = getattr(scope["app"].state, "steer", None) if "app" in scope else None
    return message if serving is None else numbered_from_end(message, serving.engine.info.n_layers)


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error raised while a request is served; unknown ones stay vague."""
    if isinstance(error, SteerError):
        body = error_body(
            error.message, status=error.status, code=error.code, param=error.param or None
        )
        return error.status, body
    return 500, error_body(
        "the server failed while answering; the request may be tried again",
        status=500,
        code="internal_error",
    )


def install(app: FastAPI) -> None:
    """Adds the handlers to `app`."""
    app.add_exception_handler(SteerError, _on_failure)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_failure)


async def answer(request: Request, error: Exception) -> Response:
    """The response to an error of a route; counts it."""
    if isinstance(error, RequestValidationError):
        return await _on_invalid(request, error)
    if isinstance(error, HTTPException):
        return await _on_http(request, error)
    if isinstance(error, ClientDisconnect):
        return await _on_disconnect(request, error)
    return await _on_failure(request, error)


def invalid_field(
    error: ValidationError, body: Mapping[str, Any], model: type[BaseModel]
) -> SteerError:
    """pydantic's complaint about fields of the request's `body`, which should be a `model`, as the
    error to raise."""
    items = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
    message, code, at = _sentences(items, body, model)
    return SteerError(message, param=at, code=code)


async def _on_failure(request: Request, error: Exception) -> Response:
    status, body = failure(error)
    body["error"]["message"] = for_this_model(body["error"]["message"], request.scope)
    note(request.scope, body["error"]["code"])
    if status >= 500 and isinstance(error, SteerError):
        log.error(
            "%s %s (%s): %s",
            request.method,
            request.url.path,
            request_id(),
            error.code,
            exc_info=error,
        )
    headers = {"retry-after": "1"} if status == 503 else {}
    if (name := request_id()) is not None:
        # What no route expected is answered in front of all middleware.
        headers[HEADER] = name
    return Response(json.dumps(body), status, headers, media_type="application/json")


async def _on_disconnect(_: Request, __: Exception) -> Response:
    # Nobody is there to read it; 499 is what proxies log for a client that closed the connection.
    return Response(status_code=499)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http_error")
    message = str(error.detail)
    if error.status_code in (404, 405) and error.detail in ("Not Found", "Method Not Allowed"):
        message = f"there is no route {request.method} {request.url.path!r}: see /docs"
    note(request.scope, code)
    return error_response(message, status=error.status_code, code=code, headers=error.headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    items = error.errors()
    message, code, at = _sentences(items, error.body, body_model(request.scope))
    message = for_this_model(message, request.scope)
    note(request.scope, code)
    return error_response(message, status=400, code=code, param=at)


def _sentences(
    items: Sequence[Mapping[str, Any]], body: Any, model: type[BaseModel] | None = None
) -> tuple[str, str, str | None]:
    """The first of pydantic's errors and how many others there are, its code, and where it is.

    Where a field may be one of several things, each of them is an error of its own. `model` is
    what the body should be.
    """
    first = items[0]
    if first["type"] == "missing":
        # What is misspelt is missing as well, and explains that.
        beside = (item for item in items if item["loc"][:-1] == first["loc"][:-1])
        first = next((item for item in beside if item["type"] == "extra_forbidden"), first)
    at = _param(first, body)
    here = [item for item in items if _param(item, body) == at]
    message, code = _sentence(here, at, model)
    others = {_param(item, body) for item in items} - {at}
    if others:
        message += f" (and {len(others)} more problem{'s' if len(others) > 1 else ''})"
    return message, code, at


def _sentence(
    items: Sequence[Mapping[str, Any]], at: str | None, model: type[BaseModel] | None
) -> tuple[str, str]:
    """What is wrong in one place, in the words of a caller who sees JSON, and its code."""
    item = items[0]
    kind, loc = item["type"], item["loc"]
    if kind == "json_invalid":
        return f"the body is not JSON: {item['ctx']['error']}", "invalid_json"
    if loc == ("body",) and kind in ("missing", "model_attributes_type", "dict_type"):
        return "the body must be a JSON object", "invalid_json"
    if kind == "missing":
        return f"the field {loc[-1]!r} is required", "missing_field"
    if kind == "extra_forbidden":
        return unknown_field(loc, model), "unknown_field"
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, "), "invalid_value"
    if kind.startswith("unsupported_"):
        return item["msg"], kind
    if kind == "negative_layer":
        return in_json_words(item), "invalid_value"
    needed = ", or ".join(dict.fromkeys(in_json_words(one) for one in items))
    return f"{_name(at, loc)}: {needed}; got {quoted(item['input'])}", "invalid_value"


def _name(at: str | None, loc: tuple[str | int, ...]) -> str:
    """The field at the pointer `at`, of a list with the place in it; else the part of `loc`."""
    parts = (at or "").split("/")[1:]
    if not parts:
        return str(loc[-1])
    places = list(takewhile(str.isdigit, reversed(parts)))
    named = parts[: len(parts) - len(places)]
    return (named[-1] if named else "body") + "".join(f"[{one}]" for one in reversed(places))


def _param(item: Mapping[str, Any], body: Any) -> str | None:
    """A JSON pointer into the body, without the parts that pydantic adds for union members."""
    if item["type"] == "json_invalid":
        return None
    path: list[str | int] = []
    parts = item["loc"][1:]
    for place, part in enumerate(parts):
        inside = isinstance(body, Mapping) and part in body
        if inside or (isinstance(body, list) and isinstance(part, int) and part < len(body)):
            path.append(part)
            body = body[part]
        elif item["loc"][0] != "body" or (item["type"] == "missing" and place == len(parts) - 1):
            path.append(part)
    return pointer(*path) or None
