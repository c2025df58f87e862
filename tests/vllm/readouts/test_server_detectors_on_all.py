"""Detectors that the operator has armed on every request of vLLM's server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from liveness import LIVENESS_SECONDS
from vllm_server import running_server

from steer.artefacts.detector import Detector
from steer.registry.registry import Registry

MODEL, WIDTH = "steer-demo", 192
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 5}
TEXT = {"model": MODEL, "prompt": "How are you?", "max_tokens": 5}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    place = tmp_path_factory.mktemp("server") / "registry"
    with Registry.open(place) as registry:
        for name, threshold in (("always", -1e9), ("never", 1e9)):
            one = Detector.of(torch.ones(WIDTH), layer=3, threshold=threshold)
            registry.add(name, one)
    with (
        running_server(place, STEER_DETECTORS="never:stop,always") as url,
        httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("chat/completions", CHAT),
        ("completions", TEXT),
        ("responses", {"model": MODEL, "input": "How are you?", "max_output_tokens": 5}),
        ("chat/completions", CHAT | {"detectors": [{"name": "always", "threshold": 1e9}]}),
        ("chat/completions", CHAT | {"inspect": {"norms": [1]}}),
    ],
)
def test_every_answer_is_watched(http: httpx.Client, route: str, body: dict[str, Any]) -> None:
    response = http.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    found = {one["name"]: one["fired"] for one in response.json()["detections"]}
    assert found == {"never": False, "always": True}
    assert response.headers["x-steer-detections"] == "always"


def test_a_stream_is_watched(http: httpx.Client) -> None:
    text = http.post("/v1/chat/completions", json=CHAT | {"stream": True}).text
    assert '"detections"' in text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", CHAT),
        ("/v1/completions", TEXT | {"use_beam_search": True}),
        ("/v1/completions", TEXT | {"n": 2}),
    ],
)
def test_what_none_of_them_would_watch_is_refused(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert "watch" in response.text


def test_the_engines_own_requests_and_those_that_say_nothing_go_on(http: httpx.Client) -> None:
    """Inspection and tokens are no answers."""
    read = http.post("/v1/inspect/activations", json={"text": "How are you?", "layers": [1]})
    assert read.status_code == 200, read.text
    assert http.post("/tokenize", json=TEXT).status_code == 200
