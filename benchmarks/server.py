"""A program that answers chats over HTTP, for as long as it is measured."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

from benchmarks.child import last_lines

START_SECONDS = 1800.0
"""vLLM may compile for many minutes. Whatever takes longer does not start, or answer, at all."""
ANSWER_SECONDS = 3600.0
_LOOK_SECONDS = 0.2
_IDLE_SECONDS = 2.0
"""Connections are not used again later: servers close idle ones after five seconds, and one may be
closing when it is written to."""


Found = TypeVar("Found")


class Server:
    """The processes of `command`, in whose words `PORT` stands for the port. Raises `RuntimeError`,
    with what they printed last, where they do not start."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        port = free_port()
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [word.replace("PORT", str(port)) for word in command],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=ANSWER_SECONDS,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_SECONDS),
        )

    def wait(self) -> None:
        """Until its own health route says that it is up."""
        until = time.monotonic() + START_SECONDS
        while not self._runner.run(self._is_up()):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{last_lines(self._log)}")
            time.sleep(_LOOK_SECONDS)

    def ask(self, bodies: Sequence[Mapping[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
        """All chats at once; the seconds until the last answer, and the answers. Raises
        `RuntimeError`, with the server's words, where one is refused."""
        return self._runner.run(self._ask(bodies))

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Found]]) -> Found:
        """What `work` gives, which is handed a client of this server."""

        async def running() -> Found:
            return await work(self._http)

        return self._runner.run(running())

    def close(self) -> None:
        """Asks it to stop, and ends whatever is left in its session."""
        self._runner.run(self._http.aclose())
        self._runner.close()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    async def _is_up(self) -> bool:
        try:
            return (await self._http.get("/health")).is_success
        except httpx.TransportError:
            return False

    async def _ask(self, bodies: Sequence[Mapping[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(self._http.post("/v1/chat/completions", json=body) for body in bodies)
        )
        seconds = time.perf_counter() - started
        for answer in answers:
            if not answer.is_success:
                raise RuntimeError(f"HTTP {answer.status_code}: {answer.text[:1000]}")
        return seconds, [answer.json() for answer in answers]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
