"""What hostile and unlucky clients of vLLM's server hear, and what its end leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from liveness import LIVENESS_SECONDS, eventually
from vllm_server import running_server

from steer.registry.registry import Registry

LIMIT = 1 << 20
DEEP = "[" * 10_000 + "]" * 10_000
CHAT = {"model": "steer-demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}
THEIRS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
ROUTES = (
    *THEIRS,
    "/v1/steering/validate",
    "/v1/steering/import",
    "/v1/steering/fit",
    "/v1/steering/profiles",
    "/v1/inspect/logit-lens",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bounds") / "registry"


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[tuple[ExitStack, str]]:
    with ExitStack() as stack:
        yield (
            stack,
            stack.enter_context(running_server(place, STEER_MAX_BODY_BYTES=str(LIMIT))),
        )


@pytest.fixture
def http(running: tuple[ExitStack, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running[1], timeout=LIVENESS_SECONDS) as client:
        yield client
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("text", [DEEP, f'{{"steering": {DEEP}}}', '{"steering":' * 10_000])
def test_deep_json_is_refused(http: httpx.Client, route: str, text: str) -> None:
    response = http.post(route, content=text, headers=JSON)
    assert 400 <= response.status_code < 500, response.text
    assert route in THEIRS or response.json()["error"]["code"]


def test_a_deep_spec_in_the_arguments_is_refused(http: httpx.Client) -> None:
    for route, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"model": "steer-demo", "input": "Hi", "max_output_tokens": 2}),
    ):
        response = http.post(route, json={**body, "vllm_xargs": {"steering": DEEP}})
        assert response.status_code == 400, response.text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("declared", [True, False])
def test_bodies_have_a_limit(http: httpx.Client, route: str, declared: bool) -> None:
    if route == "/v1/steering/import":
        pytest.skip("an upload has a limit of its own")
    data = json.dumps({**CHAT, "steering": "x" * LIMIT}).encode()
    content: Any = data if declared else iter([data[: LIMIT // 2], data[LIMIT // 2 :]])
    response = http.post(route, content=content, headers=JSON)
    assert response.status_code == 413, response.text


def test_the_document_says_what_our_routes_answer(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    ours = [path for path in document["paths"] if path.startswith(("/v1/steering/", "/v1/jobs"))]
    assert ours
    for path in ours:
        for operation in document["paths"][path].values():
            assert "422" not in operation["responses"]
            assert {"401", "500"} <= operation["responses"].keys()


def test_the_end_puts_running_jobs_back(running: tuple[ExitStack, str], place: Path) -> None:
    """Last, because it ends the server."""
    stack, url = running
    with httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as http:
        asked = http.post(
            "/v1/steering/sweep",
            json={
                "vector": "french",
                "score": "words:le,la",
                "prompts": [f"Count to {n}." for n in range(400)],
                "max_tokens": 128,
            },
        )
        assert asked.status_code == 202, asked.text
        job = asked.json()["id"]
        eventually(lambda: http.get(f"/v1/jobs/{job}").json(), lambda one: one["progress"]["done"])
    stack.close()
    with Registry.open(place) as registry:
        left = registry.jobs.get(job)
    assert (left.state, left.error) == ("queued", None)
