"""`steer jobs` against a server on a port."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from counting_jobs import QUICK, CountParams, Gate, counting, finished
from fastapi import FastAPI
from typer.testing import CliRunner

from steer.cli import app as commands
from steer.jobs import JobRunner

PAIRS = [{"positive": f"a happy day {n}", "negative": f"a sad day {n}"} for n in range(8)]


def steer(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(commands, ["jobs", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_a_fit_is_asked_for_and_followed(live: str, tmp_path: Path) -> None:
    params, data = tmp_path / "fit.json", tmp_path / "pairs.jsonl"
    params.write_text(json.dumps({"name": "happy", "layers": [1]}))
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    result = json.loads(steer("submit", "fit", params, "--data", data, "--watch", "-u", live))
    assert result["vector"].startswith("happy@")
    job_id = steer("submit", "fit", params, "--data", data, "-u", live).strip()
    again = json.loads(steer("watch", job_id, "-u", live))
    assert (again["vector"], again["created"]) == (result["vector"], False)
    shown = json.loads(steer("show", job_id, "-u", live))
    assert (shown["id"], shown["state"]) == (job_id, "succeeded")
    rows = json.loads(steer("list", "--kind", "fit", "--json", "-u", live))
    assert rows[0]["id"] == job_id
    assert "succeeded" in steer("list", "-u", live)
    steer("delete", job_id, "-u", live)
    assert "unknown_job" in steer("show", job_id, "-u", live, code=2)


def test_what_the_server_refuses_is_said(live: str, tmp_path: Path) -> None:
    params = tmp_path / "fit.json"
    params.write_text(json.dumps({"name": "happy", "pairs": PAIRS, "layers": [99]}))
    assert "layer_out_of_range" in steer("submit", "fit", params, "-u", live, code=2)
    assert "not_found" in steer("submit", "no-such-kind", params, "-u", live, code=2)
    assert "unknown_job" in steer("watch", "job-x", "-u", live, code=2)
    assert "not_found" in steer("cancel", "../models", "-u", live, code=2)
    missing = steer("submit", "fit", params, "--data", tmp_path / "none", "-u", live, code=2)
    assert "no_such_file" in missing


def test_a_job_that_fails_or_is_cancelled(live: str, app: FastAPI) -> None:
    serving: Any = app.state.steer
    gate = Gate()
    gate.open = False
    runner = JobRunner(serving.engine, serving.registry, {"count": counting(gate)}, QUICK)
    object.__setattr__(serving, "jobs", runner)
    waiting = runner.submit("count", CountParams()).id
    assert "cancelled" in steer("cancel", waiting, "-u", live)
    assert "cancelled" in steer("watch", waiting, "-u", live, code=2)
    failing = runner.submit("count", CountParams(fail_at=0)).id
    gate.allow(1)
    runner.start()
    finished(runner, failing)
    assert "told" in steer("watch", failing, "-u", live, code=2)
    runner.stop()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no url", "ftp://x"])
def test_a_server_that_is_not_there(url: str) -> None:
    assert "no_server" in steer("list", "-u", url, code=2)
