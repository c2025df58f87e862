"""A real server in this process, for as long as a block of code runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from liveness import LIVENESS_SECONDS

from steer.engines.transformers.checkpoints.known import DEMO
from steer_server.serve import Server, build
from steer_server.settings import ServerSettings


@contextmanager
def live_server(registry: Path, model: str = DEMO.name) -> Iterator[str]:
    """`model`, served as `make serve` does, on a port of its own; yields its URL."""
    # No share of requests is measured besides those that ask: which they are is drawn by their
    # names, and so by chance.
    settings = ServerSettings(model=model, port=0, registry=str(registry), measured_share=0)
    server = Server(build(settings), settings)
    started = threading.Event()
    startup = server.startup

    async def observed(*args: object, **kwargs: object) -> None:
        await startup(*args, **kwargs)  # type: ignore[arg-type]
        started.set()

    server.startup = observed  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if not started.wait(LIVENESS_SECONDS):
            raise RuntimeError(f"the server did not start within {LIVENESS_SECONDS} seconds")
        yield server.url
    finally:
        server.should_exit = True
        thread.join()
