"""Every setting has a variable, on every engine's server, and options come before variables."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from steer.cli import app
from steer.errors import SpecError
from steer_server import serve
from steer_server.settings import VARIABLES, ServerSettings, settings_from
from steer_server.vllm.launch import environment

OTHER: dict[str, tuple[str, Any]] = {
    "max_body_bytes": ("7", 7),
    "max_upload_bytes": ("7", 7),
    "allow_inline_vectors": ("false", False),
    "measured_share": ("0.5", 0.5),
    "metric_names": ("7", 7),
    "plan_cache_size": ("7", 7),
    "strength_limit": ("cap", "cap"),
    "job_workers": ("7", 7),
    "job_queue": ("7", 7),
    "jobs_kept": ("7", 7),
    "job_duty": ("0.5", 0.5),
    "inspection_workers": ("7", 7),
    "inspection_queue": ("7", 7),
    "detectors": ("rude:stop,french", ("rude:stop", "french")),
    "capture_rows": ("7", 7),
    "capture_bytes": ("0", 0),
    "hub_imports": ("false", False),
    "max_hub_bytes": ("7", 7),
    "embedder": ("http://127.0.0.1:9/v1#model=m", "http://127.0.0.1:9/v1#model=m"),
    "embedder_key": ("secret", SecretStr("secret")),
    "labeller": ("http://127.0.0.1:9/v1#model=m", "http://127.0.0.1:9/v1#model=m"),
    "labeller_key": ("secret", SecretStr("secret")),
    "labeller_questions": ("7", 7),
    "insecure": ("true", True),
    "allowed_hosts": ("a,b", ("a", "b")),
    "allowed_origins": ("https://a.example", ("https://a.example",)),
    "access_log": ("false", False),
    "patience_seconds": ("7", 7.0),
    "readout_layers": ("7", 7),
    "readout_numbers": ("7", 7),
    "readout_values": ("7", 7),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """The settings with which `steer serve` would have served."""
    found: list[ServerSettings] = []
    monkeypatch.setattr(serve, "run", found.append)
    return found


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_rules_steers_own_server_and_vllms(
    name: str, started: list[ServerSettings], tmp_path: Any
) -> None:
    text, value = OTHER[name]
    command = ["serve", "--engine", "fake", "--registry", str(tmp_path)]
    result = CliRunner().invoke(app, command, env={VARIABLES[name]: text})
    assert result.exit_code == 0, result.output
    assert getattr(started[0], name) == value
    assert getattr(started[0], name) != getattr(ServerSettings(), name)
    # And is handed on to vLLM's server as it was.
    handed = environment(started[0], {})
    assert settings_from(handed) == settings_from({VARIABLES[name]: text})


def test_an_option_comes_before_its_variable(started: list[ServerSettings], tmp_path: Any) -> None:
    command = ["serve", "--engine", "fake", "--registry", str(tmp_path), "--hub-imports"]
    command += ["--job-workers", "3", "--allowed-host", "a", "--allowed-host", "b"]
    variables = {"STEER_HUB_IMPORTS": "false", "STEER_JOB_WORKERS": "5", "STEER_ALLOWED_HOSTS": "c"}
    assert CliRunner().invoke(app, command, env=variables).exit_code == 0
    (settings,) = started
    assert (settings.hub_imports, settings.job_workers) == (True, 3)
    assert settings.allowed_hosts == ("a", "b")


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(SpecError, match=r"STEER_JOB_DUTY='2'.*less than or equal to 1"):
        settings_from({"STEER_JOB_DUTY": "2"})
    with pytest.raises(SpecError, match=r"STEER_DETECTORS='rude:shout'.*NAME:stop"):
        settings_from({"STEER_DETECTORS": "rude:shout"})
