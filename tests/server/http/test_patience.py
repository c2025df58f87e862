"""Connections that bring no whole request are closed; clocks are moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message
from uvicorn.config import Config
from uvicorn.server import ServerState

from steer_server.http.patience import StalledBody, patient_protocol

REQUEST = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Timers:
    """An event loop's timers: they run out when the test says so."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.waiting: list[Timer] = []

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(seconds, call, self)
        self.waiting.append(timer)
        return timer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class Timer:
    def __init__(self, seconds: float, call: Callable[[], None], timers: Timers) -> None:
        self.seconds, self.run, self._timers = seconds, call, timers

    def cancel(self) -> None:
        if self in self._timers.waiting:
            self._timers.waiting.remove(self)


class Connection(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.sent = b""

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Answering:
    """An application that answers once the test lets it."""

    def __init__(self) -> None:
        self.go, self.done = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        self.done.set()


@pytest.fixture
async def timers() -> Timers:
    return Timers(asyncio.get_running_loop())


@pytest.fixture
async def app() -> Answering:
    return Answering()


@pytest.fixture
async def connected(timers: Timers, app: Answering) -> tuple[Any, Connection]:
    config = Config(app, lifespan="off", ws="none")
    protocol: Any = patient_protocol(7.0)(
        config=config, server_state=ServerState(), app_state={}, _loop=timers
    )
    connection = Connection()
    protocol.connection_made(connection)
    return protocol, connection


def ours(timers: Timers) -> list[Timer]:
    return [timer for timer in timers.waiting if timer.seconds == 7.0]


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", REQUEST[:-2]])
async def test_a_head_that_does_not_come_closes_the_connection(
    timers: Timers, connected: tuple[Any, Connection], sent: bytes
) -> None:
    protocol, connection = connected
    for byte in sent:
        protocol.data_received(bytes([byte]))  # one at a time does not win time
    (timer,) = ours(timers)
    assert not connection.closed
    timer.run()
    assert connection.closed


async def test_a_request_under_way_is_not_hurried(
    timers: Timers, app: Answering, connected: tuple[Any, Connection]
) -> None:
    protocol, connection = connected
    protocol.data_received(REQUEST)
    assert not ours(timers)
    app.go.set()
    await app.done.wait()
    assert not connection.closed
    # Half of the next one.
    protocol.data_received(REQUEST[:10])
    (timer,) = ours(timers)
    timer.run()
    assert connection.closed


async def test_a_connection_that_is_lost_leaves_no_timer(
    timers: Timers, connected: tuple[Any, Connection]
) -> None:
    connected[0].connection_lost(None)
    assert not ours(timers)


async def test_a_body_that_stalls_is_answered() -> None:
    pieces: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    caught: list[Exception] = []

    async def receive() -> Message:
        if pieces:
            return pieces.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive()).get("more_body"):
                pass
        except Exception as error:
            caught.append(error)

    async def send(message: Message) -> None: ...

    # No patience at all: what is there is read, what is not is not waited for.
    await StalledBody(reads, seconds=0.0)({"type": "http"}, receive, send)
    (error,) = caught
    assert (error.status_code, error.headers) == (408, {"connection": "close"})  # type: ignore[attr-defined]
