"""The OpenAPI document, as docs/openapi.json holds it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from steer.engines.fake.engine import FakeEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

DOCUMENT = Path("docs/openapi.json")


def openapi_document() -> dict[str, Any]:
    """The document of every route; the same for every engine and model."""
    with tempfile.TemporaryDirectory() as folder, Registry.open(folder) as registry:
        return create_app(FakeEngine(), registry, ServerSettings()).openapi()


def openapi_text() -> str:
    """The document as it is written to a file."""
    return json.dumps(openapi_document(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(root: Path) -> None:
    """Writes the document below the project's folder `root`."""
    (root / DOCUMENT).write_text(openapi_text(), encoding="utf-8")
