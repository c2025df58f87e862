"""A server without a key answers its own user, and no web page that this user happens to visit.

A browser sends any page's multipart form to a loopback address without asking, and lets a page
whose name is made to resolve to that address read the answers too. The first shows in `Origin`,
the second in `Host`. Where a key is needed no page can send it, and neither is looked at.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from steer_server.http.openai_errors import refuse

ANY = "*"
"""In place of a name: all of them."""

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class OwnPagesOnly:
    """ASGI middleware: refuses requests for hosts and from origins that nobody named.

    `hosts` are the names that the server answers to, besides its addresses and those that end in
    `localhost`; `origins` (`https://console.example`) are pages that may use it, besides its own.
    `guarded` are the beginnings of the paths that it looks at; by default all.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        guarded: tuple[str, ...] = ("",),
    ) -> None:
        self._app, self._guarded = app, guarded
        self._hosts = {host.lower() for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._guarded):
            problem = self._problem(dict(scope["headers"]), scope.get("scheme", "http"))
            if problem is not None:
                response = refuse(scope, problem, status=403, code="foreign_origin")
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, headers: Mapping[bytes, bytes], scheme: str) -> str | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._answers_to(host):
            return (
                f"this server has no key and does not answer to the host {host!r}: use its "
                "address, start it with --allowed-host for that name, or with a key"
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and not self._is_own(origin, host, scheme):
            return (
                f"this server has no key and does not take requests from pages of {origin!r}: "
                "start it with --allowed-origin for that page, or with a key"
            )
        return None

    def _answers_to(self, host: str) -> bool:
        if ANY in self._hosts or not host:
            return True  # HTTP/1.0 has no host, and no browser speaks it
        name = _name(host)
        if name is None:
            return False
        return name in self._hosts or is_loopback(name) or is_address(name)

    def _is_own(self, origin: str, host: str, scheme: str) -> bool:
        if ANY in self._origins or origin in self._origins:
            return True
        theirs = _name_and_port(origin)
        return theirs is not None and theirs == _name_and_port(f"{scheme}://{host}")


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's own, as seen by itself."""
    name = name.strip("[]").rstrip(".").lower()
    if is_address(name):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def is_address(name: str) -> bool:
    """Whether `name` is an IP address, which no page can have resolve to another one."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _name(host: str) -> str | None:
    found = _name_and_port(f"http://{host}")
    return None if found is None else found[0]


def _name_and_port(url: str) -> tuple[str, int | None] | None:
    """Host and port of a URL, the scheme's own where it names none; None where it is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return None
    return None if not parts.hostname else (parts.hostname.rstrip("."), port)
