"""`steer serve --engine vllm`: what it becomes, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steer.cli import app
from steer_server.vllm import launch


class Became(SystemExit):
    """Stands for the end of this program: nothing of it runs any more."""


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """With vLLM there, the arguments and the environment of what takes this process's place."""
    seen: list[Any] = []

    def execute(file: str, arguments: list[str], environment: dict[str, str]) -> None:
        seen.extend([file, arguments, environment])
        raise Became(1)

    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execvpe", execute)
    return seen


def serve(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", "--engine", "vllm", *arguments])


def test_it_becomes_vllms_own_server(became: list[Any], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    result = serve(
        *("--port", "8123", "--host", "0.0.0.0", "--rows", "7", "--dtype", "float32"),
        *("--engine-option", "enforce_eager=true", "--engine-option", "max-model-len=256"),
        *("--registry", str(tmp_path / "r"), "--api-key-file", str(tmp_path / "key")),
        *("--served-name", "mine", "--no-inline-vectors", "--max-upload-mib", "3"),
    )
    assert isinstance(result.exception, Became), result.output
    python, arguments, environment = became
    assert arguments[:3] == [python, "-m", "vllm.entrypoints.openai.api_server"]
    given = " ".join(arguments)
    assert "vectors/demo/model --served-model-name mine --host 0.0.0.0 --port 8123" in given
    assert "--max-num-seqs 7 --dtype float32 --enforce-eager --max-model-len 256" in given
    assert "secret" not in given
    assert environment["VLLM_API_KEY"] == "secret"
    assert "steer" in environment["VLLM_PLUGINS"].split(",")
    assert environment["STEER_REGISTRY"] == str(tmp_path / "r")
    assert environment["STEER_ALLOW_INLINE_VECTORS"] == "False"
    assert environment["STEER_MAX_UPLOAD_BYTES"] == str(3 << 20)
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--slots", "4"), "--slots"),
        (("--device", "cuda"), "--device"),
        (("--engine-option", "eager"), "NAME=VALUE"),
        (("--engine-option", "port=3"), "use --port"),
        (("--engine-option", "a b=3"), "'a b'"),
    ],
)
def test_what_is_not_vllms_is_refused(
    became: list[Any], arguments: tuple[str, ...], says: str
) -> None:
    result = serve(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "invalid_option" in result.stderr
    assert not became


def test_engine_options_are_for_vllm_alone() -> None:
    result = CliRunner().invoke(app, ["serve", "--engine", "fake", "--engine-option", "a=b"])
    assert result.exit_code == 2
    assert "invalid_option" in result.stderr


def test_without_vllm_it_says_what_to_install(
    became: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    result = serve()
    assert result.exit_code == 2
    assert "pip install" in result.stderr
    assert "vllm_not_installed" in result.stderr
    assert not became
