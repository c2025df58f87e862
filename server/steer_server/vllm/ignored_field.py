"""Steer's fields are refused where nobody would hear them.

vLLM's routes take fields that they do not know and leave them aside. A request with `steering` for
one that Steer does not extend, or with a slip of the pen, would be answered unsteered, in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from anyio import to_thread
from fastapi.exceptions import RequestValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.errors import SpecError, pointer
from steer_server.generation.request_models import AddedFields
from steer_server.http.field_names import meant, sent_as
from steer_server.http.json_body import parse_json
from steer_server.http.openai_errors import refuse

_HEARD = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_OURS = ("/v1/steering/", "/v1/inspect/")
_SILENT = ("/render", "/derender", "/tokenize", "/detokenize", "/count_tokens")
"""How the paths of those routes end that generate nothing."""

_SPEAKS = ("/v1/messages", "/invocations")
"""The paths of those other routes that take a spec as JSON text."""

FIELDS = frozenset(AddedFields.model_fields)
_HOLDERS = ("extra_body", "extra_args")
"""What clients call the place for further fields, and take off themselves."""
_NAMES = re.compile(rb'"(?:steer|interventions"|' + "|".join(sorted(FIELDS)).encode() + rb")")
"""What a body holds that may have one of the fields, or a word that stands for one."""


def misplaced(extra: Mapping[str, Any]) -> SpecError | None:
    """What is wrong with fields that vLLM does not know and would leave aside, where they mean
    Steer: an answer would be unsteered, or unwatched, in silence."""
    for name, value in extra.items():
        field = meant(name, FIELDS)
        if field is not None and field != name:
            return SpecError(
                f"unknown field {name!r}: {sent_as(field)}",
                param=pointer(name),
                code="unknown_field",
            )
        if name in _HOLDERS and isinstance(value, Mapping) and (inside := FIELDS & value.keys()):
            found = min(inside)
            return SpecError(
                f"nothing reads {name!r} here, which is an argument of clients: send {found!r} "
                "beside 'model'",
                param=pointer(name, found),
                code="unknown_field",
            )
    return None


class RefuseIgnoredField:
    """ASGI middleware in front of vLLM's other routes; it looks at JSON bodies alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _examined(scope):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if _NAMES.search(body):
            wrong = await to_thread.run_sync(_unheard, body, _path(scope))
            if wrong is not None:
                response = refuse(
                    scope,
                    wrong.message,
                    status=400,
                    code="unsupported_parameter",
                    param=wrong.param,
                )
                await response(scope, receive, send)
                return
        await self._app(scope, _replayed(messages, receive), send)


def _examined(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = _path(scope)
    if path in _HEARD or path.startswith(_OURS) or path.endswith(_SILENT):
        return False
    return b"json" in dict(scope["headers"]).get(b"content-type", b"")


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).rstrip("/")


def _unheard(body: bytes, path: str) -> SpecError | None:
    """What of Steer's `body` holds that this route would leave aside."""
    try:
        content = parse_json(body)
    except RequestValidationError:
        return None  # the route says so better
    if not isinstance(content, dict):
        return None
    for name, value in content.items():
        if value is not None and (field := meant(name, FIELDS)) is not None:
            text = field == "steering" and path.startswith(_SPEAKS)
            told = "send the spec there as JSON text, 'vllm_xargs': {'steering': '{…}'}, or "
            return SpecError(
                f"{path} has no field {name!r}: {told if text else ''}use /v1/chat/completions",
                param=pointer(name),
            )
    return misplaced(content)


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def replayed() -> Message:
        for message in waiting:
            return message
        return await receive()

    return replayed
