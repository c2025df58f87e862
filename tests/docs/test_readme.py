"""The README is run: its Python against a live server, with the output it prints."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_server.serve import Server, build
from steer_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo model, served as `make serve` does, on a port of its own."""
    settings = ServerSettings(port=0, registry=str(tmp_path_factory.mktemp("registry")))
    server = Server(build(settings), settings)
    started = threading.Event()
    startup = server.startup

    async def observed(*args: object, **kwargs: object) -> None:
        await startup(*args, **kwargs)  # type: ignore[arg-type]
        started.set()

    server.startup = observed  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(120), "the server did not start"
    yield server.url
    server.should_exit = True
    thread.join()


def python_blocks(page: str) -> list[tuple[str, str | None]]:
    """Each Python block with the text block that follows it at once, its expected output."""
    found = list(BLOCK.finditer(page))
    blocks: list[tuple[str, str | None]] = []
    for place, match in enumerate(found):
        if match[1] != "python":
            continue
        after = found[place + 1] if place + 1 < len(found) else None
        adjacent = after is not None and page[match.end() : after.start()].strip() == ""
        expected = after[2] if after is not None and adjacent and after[1] == "text" else None
        blocks.append((match[2], expected))
    return blocks


def test_the_readme_prints_what_it_says(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "README.md").read_text()
    blocks = python_blocks(page)
    assert len(blocks) >= 4
    assert sum(expected is not None for _, expected in blocks) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.replace("http://127.0.0.1:8000", url), namespace)
        if expected is not None:
            assert printed.getvalue() == expected
