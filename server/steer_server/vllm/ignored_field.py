"""The field `steering` is refused where nobody would hear it.

vLLM's routes take fields that they do not know and leave them aside. A request with `steering` for
one of those would be answered unsteered, in silence.
"""

from __future__ import annotations

from anyio import to_thread
from fastapi.exceptions import RequestValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer_server.http.json_body import parse_json
from steer_server.http.openai_errors import refuse

_HEARD = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_OURS = ("/v1/steering/", "/v1/inspect/")
_SILENT = ("/render", "/derender", "/tokenize", "/detokenize", "/count_tokens")
"""How the paths of those routes end that generate nothing."""

_FIELD = b'"steering"'


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
        if _FIELD in body and await to_thread.run_sync(_asks, body):
            response = refuse(
                scope,
                f"{scope['path']} has no field 'steering': send the spec there as JSON text, "
                "'vllm_xargs': {'steering': '{…}'}, or use /v1/chat/completions",
                status=400,
                code="unsupported_parameter",
                param="/steering",
            )
            await response(scope, receive, send)
            return
        await self._app(scope, _replayed(messages, receive), send)


def _examined(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
    if path in _HEARD or path.startswith(_OURS) or path.endswith(_SILENT):
        return False
    return b"json" in dict(scope["headers"]).get(b"content-type", b"")


def _asks(body: bytes) -> bool:
    try:
        content = parse_json(body)
    except RequestValidationError:
        return False  # the route says so better
    return isinstance(content, dict) and content.get("steering") is not None


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def replayed() -> Message:
        for message in waiting:
            return message
        return await receive()

    return replayed
