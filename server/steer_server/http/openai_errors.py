"""Every error as OpenAI's body, `{"error": {"message", "type", "code", "param"}}`, and in it the id
of the request."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from steer.errors import SteerError, clipped, clipped_pointer, pointer, quoted
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


def invalid_field(error: ValidationError, body: Mapping[str, Any]) -> SteerError:
    """pydantic's complaint about fields of the request's `body`, as the error to raise."""
    first = error.errors()[0]
    found = {**first, "loc": ("body", *first["loc"])}
    message, code = _sentence(found)
    return SteerError(message, param=_param(found, body), code=code)


async def _on_failure(request: Request, error: Exception) -> Response:
    status, body = failure(error)
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
    first, *others = error.errors()
    message, code = _sentence(first)
    if others:
        message += f" (and {len(others)} more problems)"
    note(request.scope, code)
    return error_response(message, status=400, code=code, param=_param(first, error.body))


def _sentence(item: Mapping[str, Any]) -> tuple[str, str]:
    """pydantic's error in the words of a caller who sees JSON, and its code."""
    kind, loc = item["type"], item["loc"]
    if kind == "json_invalid":
        return f"the body is not JSON: {item['ctx']['error']}", "invalid_json"
    if loc == ("body",) and kind in ("missing", "model_attributes_type", "dict_type"):
        return "the body must be a JSON object", "invalid_json"
    if kind == "missing":
        return f"the field {loc[-1]!r} is required", "missing_field"
    if kind == "extra_forbidden":
        return f"unknown field {loc[-1]!r}: remove it", "unknown_field"
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, "), "invalid_value"
    if kind.startswith("unsupported_"):
        return item["msg"], kind
    return f"{loc[-1]}: {item['msg']}; got {quoted(item['input'])}", "invalid_value"


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
