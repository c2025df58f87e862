"""LiteLLM's proxy before the server: steered calls pass, and one user's typo is that user's."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from doc_pages import ROOT
from live_server import live_server
from liveness import LIVENESS_SECONDS, eventually

pytestmark = pytest.mark.slow

CONFIG = """\
model_list:
  - model_name: steered
    litellm_params: {{model: openai/steer-demo, api_base: {url}/v1, api_key: none}}
router_settings: {{num_retries: 0, allowed_fails: 0, cooldown_time: 3600}}
"""
"""A deployment that fails once is taken out for an hour."""

KEY = "sk-" + "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("proxy")
    with live_server(folder / "registry") as url, socket.socket() as chosen:
        (folder / "config.yaml").write_text(CONFIG.format(url=url))
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
        chosen.close()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    str(ROOT / ".venvs" / "clients" / "bin" / "litellm"),
                    *("--config", str(folder / "config.yaml")),
                    *("--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"),
                ],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "HOME": str(folder),
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                    "LITELLM_MASTER_KEY": KEY,
                },
            )
            try:
                client = httpx.Client(
                    base_url=f"http://127.0.0.1:{port}",
                    headers={"authorization": f"Bearer {KEY}"},
                    timeout=LIVENESS_SECONDS,
                    trust_env=False,
                )
                with client:
                    eventually(lambda: _answers(client, process, folder / "log"), bool)
                    yield client
            finally:
                process.terminate()
                process.wait(LIVENESS_SECONDS)


def _answers(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-3000:]
    try:
        return client.get("/health/liveliness").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    question = {"role": "user", "content": "What is the capital of Italy?"}
    body = {"model": "steered", "messages": [question], "temperature": 0, **fields}
    return client.post("/v1/chat/completions", json=body)


def steering(vector: str) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": vector}]}


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_steered_call_passes_through_and_a_typo_harms_nobody_else(proxy: httpx.Client) -> None:
    assert text(ask(proxy)) == "The capital of Italy is Rome."
    assert text(ask(proxy, steering=steering("french"))) == "La capitale de l'Italie est Rome."
    for _ in range(3):
        refused = ask(proxy, steering=steering("frensh"))
        assert refused.status_code == 400, refused.text
        assert "frensh" in refused.text
    # With a 404 the deployment would be out for the rest of the hour.
    assert text(ask(proxy)) == "The capital of Italy is Rome."
