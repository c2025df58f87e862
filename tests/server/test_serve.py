"""From settings to a server."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from rich.console import Console

from steer.engines.fake.engine import FakeEngine
from steer.errors import Unsupported
from steer_server.banner import banner, example
from steer_server.serve import build, load_engine
from steer_server.settings import ServerSettings


def test_the_settings_say_what_is_served(tmp_path: Path) -> None:
    settings = ServerSettings(engine="fake", model="some-model", registry=str(tmp_path / "r"))
    app = build(settings)
    assert isinstance(app.state.steer.engine, FakeEngine)
    assert app.state.steer.model_name == "some-model"
    app.state.steer.registry.close()


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"'abacus'.*transformers"):
        load_engine(ServerSettings(engine="abacus"))
    with pytest.raises(ValidationError):
        ServerSettings(max_uploads=5)  # type: ignore[call-arg]


def test_the_banner_says_where_what_and_how(app: FastAPI) -> None:
    out = io.StringIO()
    serving = app.state.steer
    Console(file=out, width=300).print(banner(serving, "http://127.0.0.1:8000"))
    for part in ("http://127.0.0.1:8000/v1", "fake-model", "calm, deep, joy, wide", "curl"):
        assert part in out.getvalue()
    assert '\'{"model": "fake-model"' in example(serving, "http://x")


def test_the_engine_lives_as_long_as_the_server(live: str, engine: FakeEngine) -> None:
    assert httpx.get(f"{live}/health").json()["status"] == "ok"
    assert engine.running
