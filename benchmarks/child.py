"""A process that computes when it is told to and is idle otherwise: its two ends.

Orders and answers are lines of JSON on a socket; what the process prints goes to its log.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LAST_LINES = 20


class Child:
    """`PYTHON -m MODULE FD ARGUMENTS`, run in the repository. Raises `RuntimeError`, with the
    process's own words, where it fails."""

    def __init__(
        self,
        python: str | Path,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        mine, theirs = socket.socketpair()
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", module, str(theirs.fileno()), *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        self._socket = mine
        self._channel = mine.makefile("rw")

    def wait(self) -> None:
        """Until it is ready for orders."""
        self._answer()

    def do(self, order: str, **fields: Any) -> Any:
        self._channel.write(json.dumps({"do": order, **fields}) + "\n")
        self._channel.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process, which leaves when nobody speaks to it."""
        self._channel.close()
        self._socket.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        line = self._channel.readline()
        answer = json.loads(line) if line else {"error": f"see {self._log}"}
        if "error" in answer:
            raise RuntimeError(f"a process failed:\n{answer['error']}\n{last_lines(self._log)}")
        return answer["ok"]


def last_lines(log: Path) -> str:
    """What a process printed last."""
    return "".join(log.read_text(errors="replace").splitlines(True)[-_LAST_LINES:])


def obey(descriptor: int, start: Callable[[], Any], orders: Sequence[str]) -> None:
    """The process's own end: makes what computes, says that it is ready, and does as it is told,
    each order a method of that name, until nobody speaks to it."""
    channel = socket.socket(fileno=descriptor).makefile("rw")

    def answer(content: dict[str, Any]) -> None:
        channel.write(json.dumps(content) + "\n")
        channel.flush()

    try:
        computing = start()
        answer({"ok": "ready"})
        for line in channel:
            order = json.loads(line)
            name = order.pop("do")
            if name not in orders:
                raise ValueError(f"there is no order {name!r}")
            answer({"ok": getattr(computing, name)(**order)})
    except Exception:
        answer({"error": traceback.format_exc()})
        raise
