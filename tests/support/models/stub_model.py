"""A model behind an OpenAI-compatible server on this machine, that answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubModel:
    """Answers a question with `reply(question)`, and embeds a text as `embed(text)`; a number in
    their place is the status of a refusal. `asked` are the questions, `embedded` the texts; where
    there is a `location`, a refusal points there."""

    def __init__(self) -> None:
        self.reply: Callable[[str], str | int] = lambda question: "yes"
        self.embed: Callable[[str], list[float] | int] = lambda text: [1.0]
        self.asked: list[str] = []
        self.embedded: list[str] = []
        self.keys: set[str | None] = set()
        self.url = ""
        self.location: str | None = None
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """As a command's option names it."""
        return f"{self.url}#model=stub"

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> tuple[int, Any]:
        with self._lock:
            self.keys.add(key)
            if path.endswith("/embeddings"):
                return self._embeddings(body)
            question = body["messages"][-1]["content"]
            self.asked.append(question)
            said = self.reply(question)
        if isinstance(said, int):
            return said, {}
        message = {"role": "assistant", "content": said}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub"}
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        return 200, {**about, "choices": choices, "usage": usage}

    def _embeddings(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.embedded += body["input"]
        rows = [self.embed(text) for text in body["input"]]
        if isinstance(rows[0], int):
            return rows[0], {}
        data = [
            {"object": "embedding", "index": place, "embedding": row}
            for place, row in enumerate(rows)
        ]
        return 200, {"object": "list", "model": "stub", "data": data, "usage": {}}


@contextmanager
def stub_model() -> Iterator[StubModel]:
    """One that is served until the end."""
    one = StubModel()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = one.answer(self.path, body, self.headers.get("Authorization"))
            data = json.dumps(reply).encode()
            self.send_response(status)
            if one.location is not None:
                self.send_header("Location", one.location)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    one.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield one
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
