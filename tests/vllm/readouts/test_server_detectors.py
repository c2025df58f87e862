"""Detectors over HTTP on vLLM's server: tags, and answers that end with the token that fires."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from artefacts import random_detector
from liveness import LIVENESS_SECONDS
from vllm_server import running_server

from steer.artefacts.detection import Detection
from steer.registry.registry import Registry

MODEL, WIDTH, LAYER = "steer-demo", 192, 3
ALL = {"phases": ["prompt", "generation"]}
FRENCH = {"interventions": [{"kind": "add", "vector": "french", "where": ALL}]}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    place = tmp_path_factory.mktemp("server") / "registry"
    with Registry.open(place) as registry:
        registry.add("odd", random_detector(3, LAYER, width=WIDTH))
        mean = Detection(pooling="mean", last=3)
        registry.add("slow", random_detector(3, LAYER, width=WIDTH, detection=mean))
    with (
        running_server(place, STEER_MEASURED_SHARE="0") as url,
        httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as client,
    ):
        yield client


def body(question: str = "How are you today?", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 14, **fields}


def answer(http: httpx.Client, content: dict[str, Any], route: str = "chat/completions") -> Any:
    response = http.post(f"/v1/{route}", json=content)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(http: httpx.Client, content: dict[str, Any]) -> list[dict[str, Any]]:
    response = http.post("/v1/chat/completions", json={**content, "stream": True})
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def scores(http: httpx.Client, question: str, name: str) -> tuple[list[float], int, list[str]]:
    """The pooled score of each token of an answer but the last, found by growing answers; the
    prompt's length, and the answer's beginnings by tokens."""
    texts, running, length = [], [], 0
    for size in range(1, 15):
        found = answer(
            http, body(question, max_tokens=size, detectors=[{"name": name, "threshold": 1e9}])
        )
        texts.append(found["choices"][0]["message"]["content"])
        running.append(found["detections"][0]["score"])
        length = found["usage"]["prompt_tokens"]
        if found["choices"][0]["finish_reason"] == "stop":
            break
    return running[1:], length, texts


@pytest.mark.parametrize("name", ["odd", "slow"])
def test_an_answer_ends_with_the_token_that_fires(http: httpx.Client, name: str) -> None:
    question = "How are you today?"
    greatest, length, texts = scores(http, question, name)
    records = [n for n in range(len(greatest)) if n == 0 or greatest[n] > greatest[n - 1] + 1e-3]
    assert len(records) > 1, "the greatest score grows"
    for record in records[:3]:
        before = greatest[record - 1] if record else greatest[0] - 1.0
        asked = {"name": name, "action": "stop", "threshold": (before + greatest[record]) / 2}
        response = http.post("/v1/chat/completions", json=body(question, detectors=[asked]))
        found = response.json()
        choice, (entry,) = found["choices"][0], found["detections"]
        assert (choice["finish_reason"], entry["fired"]) == ("content_filter", True)
        assert choice["message"]["content"] == texts[record]
        assert entry["position"] == length + record
        assert found["usage"]["completion_tokens"] == record + 1
        assert response.headers["x-steer-detections"] == name
        streamed = chunks(http, body(question, detectors=[asked]))
        shown = "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed)
        assert shown == texts[record]
        assert streamed[-1]["choices"][0]["finish_reason"] == "content_filter"
        (again,) = streamed[-1]["detections"]
        assert (again["position"], again["name"]) == (entry["position"], name)


def test_the_receipt_of_an_answer_that_was_ended_is_true(http: httpx.Client) -> None:
    asked = {"name": "odd", "action": "stop", "threshold": -1e9}
    for steering in (None, FRENCH):
        fields = {} if steering is None else {"steering": steering}
        found = answer(http, body(detectors=[asked], **fields))
        assert found["usage"]["completion_tokens"] == 1
        if steering is not None:
            receipt = found["steering"]
            fed = receipt["tokens_steered"] + receipt["tokens_skipped"]
            assert fed == found["usage"]["prompt_tokens"] + 1


def test_a_prompt_that_fires_is_not_answered(http: httpx.Client) -> None:
    asked = {"name": "odd", "action": "stop", "tokens": "prompt", "threshold": -1e9}
    for _ in range(2):  # the second time the prompt's blocks lie in the cache
        found = answer(http, body(detectors=[asked]))
        choice = found["choices"][0]
        assert choice["message"]["content"] in ("", None)
        assert choice["finish_reason"] == "content_filter"
        assert found["detections"][0]["position"] == 1  # the first is not watched


def test_a_profiles_detectors_watch_whoever_uses_it(http: httpx.Client) -> None:
    armed = {"name": "odd", "action": "stop", "threshold": -1e9}
    profile = {"name": "watched", "spec": FRENCH, "detectors": [armed]}
    assert http.post("/v1/steering/profiles", json=profile).status_code == 200
    for fields in ({}, {"detectors": [{"name": "odd", "threshold": 1e9}]}):
        found = answer(http, body(model=f"{MODEL}:watched", **fields))
        assert found["choices"][0]["finish_reason"] == "content_filter"
        assert found["usage"]["completion_tokens"] == 1
        assert [(one["name"], one["fired"]) for one in found["detections"]] == [("odd", True)]
    several = http.post("/v1/chat/completions", json=body(model=f"{MODEL}:watched", n=2))
    assert several.json()["error"]["param"] == "/n"
    gone = http.delete("/v1/steering/detectors/odd")
    assert gone.json()["error"]["code"] == "in_use"
    http.delete("/v1/steering/profiles/watched")


def test_a_gate_by_a_detector_says_its_score(http: httpx.Client) -> None:
    prompt = body(detectors=[{"name": "odd", "tokens": "prompt", "threshold": 1e9}], max_tokens=1)
    greatest = answer(http, prompt)["detections"][0]["score"]
    spec = {"interventions": [{"kind": "add", "vector": "french", "layers": [4], "where": ALL}]}
    gate = {"detector": "odd", "threshold": greatest + 1}
    closed = answer(http, body(steering={**spec, "when": gate}))["steering"]
    assert [one["fired"] for one in closed["gates"]] == [0]
    assert closed["gates"][0]["value"] <= greatest + 1e-3
    gate = {"detector": "odd", "threshold": closed["gates"][0]["value"] - 1}
    opened = answer(http, body(steering={**spec, "when": gate}))["steering"]
    assert opened["gates"][0]["fired"] == opened["tokens_steered"] > 0


def test_responses_say_why_they_are_incomplete(http: httpx.Client) -> None:
    asked = {"name": "odd", "action": "stop", "threshold": -1e9}
    content = {"model": MODEL, "input": "Hello there", "detectors": [asked], "temperature": 0}
    found = answer(http, content, "responses")
    assert (found["status"], found["incomplete_details"]) == (
        "incomplete",
        {"reason": "content_filter"},
    )
    assert found["detections"][0]["fired"]
    streamed = http.post("/v1/responses", json={**content, "stream": True}).text
    last = [part for part in streamed.split("\n\n") if part][-1]
    assert last.startswith("event: response.incomplete")
    said = json.loads(last.partition("data: ")[2])["response"]
    assert said["incomplete_details"] == {"reason": "content_filter"}
    assert said["detections"][0]["fired"]


def test_many_at_once_beside_ordinary_traffic(http: httpx.Client) -> None:
    """Whoever runs beside them, answers end where they end alone."""

    def one(number: int) -> tuple[Any, ...]:
        asked: list[dict[str, Any]] = [{"name": "odd", "threshold": 1e9}, {"name": "slow"}]
        if number % 3 == 0:
            asked = [{"name": "odd", "action": "stop", "threshold": -1e9}]
        fields = {"detectors": asked} if number % 4 else {}
        found = answer(http, body(f"Tell me about {number % 6}", **fields))
        told = [(d["name"], d["fired"], d["position"]) for d in found.get("detections", ())]
        return (found["choices"][0]["message"]["content"], told)

    alone = [one(number) for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(12))) == alone


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"detectors": [{"name": "nobody"}]}, "/detectors/0/name"),
        ({"detectors": [{"name": "odd", "action": "stop"}], "n": 2, "temperature": 1}, "/n"),
        ({"detectors": [{"name": "odd", "action": "shout"}]}, "/detectors/0/action"),
        ({"detectors": [{"name": "odd"}], "compare": True, "steering": FRENCH}, "/compare"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/chat/completions", json=body(**fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_fires_are_counted(http: httpx.Client) -> None:
    answer(http, body(detectors=[{"name": "odd", "threshold": -1e9}]))
    text = http.get("/metrics").text
    assert 'steer_detector_fires_total{action="tag",detector="odd"}' in text
    assert "nobody" not in text
