"""Detectors armed on requests: what they tag, where they stop an answer, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from artefacts import random_detector
from fastapi import FastAPI

from steer.artefacts.detection import Detection
from steer.artefacts.detector import Detector
from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import FakeEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
Body = Callable[..., dict[str, Any]]
Sse = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def armed(registry: Registry) -> dict[str, Detector]:
    """`odd` at layer 2, and the same over means of three tokens."""
    made = {
        "odd": random_detector(3, 2),
        "slow": random_detector(3, 2, detection=Detection(pooling="mean", last=3)),
    }
    for name, one in made.items():
        registry.add(name, one)
    return made


async def answer(http: httpx.AsyncClient, body: dict[str, Any], url: str = CHAT) -> httpx.Response:
    response = await http.post(url, json=body)
    assert response.status_code == 200, response.text
    return response


def scores_of(engine: FakeEngine, detector: Detector, tokens: list[int], start: int) -> list[float]:
    """The pooled score at each position from `start` on."""
    (captured,) = engine.capture(CaptureRequest([tokens], (detector.point,)))
    window = detector.window()
    return list(map(window.push, detector.scores(captured.states[detector.point])[start:].tolist()))


async def told(
    http: httpx.AsyncClient, engine: FakeEngine, chat: Body, name: str, tokens: str
) -> tuple[dict[str, Any], list[float], int, str]:
    """What an answer says that is only tagged; the scores by position; the prompt's length; and
    its text."""
    engine.seen.clear()
    asked = {"name": name, "tokens": tokens, "threshold": 1e9}
    found = (await answer(http, chat(detectors=[asked], max_tokens=12))).json()
    (request,) = engine.seen
    text = found["choices"][0]["message"]["content"]
    whole = [*request.prompt, *text.encode()]
    start = 1 if tokens != "generated" else len(request.prompt)  # the first is not watched
    end = len(request.prompt) if tokens == "prompt" else len(whole) - 1
    detector = {"odd": random_detector(3, 2)}.get(name) or random_detector(
        3, 2, detection=Detection(pooling="mean", last=3)
    )
    scores = scores_of(engine, detector, whole[:end], start)
    return found["detections"][0], scores, len(request.prompt), text


@pytest.mark.parametrize("name", ["odd", "slow"])
@pytest.mark.parametrize("tokens", ["generated", "prompt", "all"])
async def test_a_tag_says_the_greatest_score_of_the_tokens_it_watched(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    chat: Body,
    armed: dict[str, Detector],
    name: str,
    tokens: str,
) -> None:
    entry, scores, _, _ = await told(http, engine, chat, name, tokens)
    assert entry["score"] == pytest.approx(max(scores), abs=1e-4)
    assert (entry["choice"], entry["name"], entry["action"]) == (0, name, "tag")
    assert (entry["fired"], entry["position"]) == (False, None)


@pytest.mark.parametrize("name", ["odd", "slow"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", [0, 3, 7])
async def test_the_token_that_fires_is_the_last_one_shown(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    chat: Body,
    sse: Sse,
    armed: dict[str, Detector],
    name: str,
    place: int,
    stream: bool,
) -> None:
    """With a threshold between the running maximum and a new one the answer ends just there."""
    _, scores, length, text = await told(http, engine, chat, name, "generated")
    records = [n for n, score in enumerate(scores) if score > max(scores[:n], default=-1e9)]
    record = max(n for n in records if n <= place)
    before = max(scores[:record], default=scores[record] - 1.0)
    threshold = (before + scores[record]) / 2
    asked = {"name": name, "action": "stop", "threshold": threshold}
    body = chat(
        detectors=[asked],
        max_tokens=12,
        stream=stream,
    )
    response = await answer(http, body)
    if stream:
        chunks = sse(response.text)
        shown = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
        finish, (entry,) = chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["detections"]
        assert all("detections" not in chunk for chunk in chunks[:-1])
    else:
        found = response.json()
        shown = found["choices"][0]["message"]["content"]
        finish, (entry,) = found["choices"][0]["finish_reason"], found["detections"]
        assert response.headers["x-steer-detections"] == name
        assert found["usage"]["completion_tokens"] == record + 1
    assert (shown, finish) == (text[: record + 1], "content_filter")
    assert (entry["fired"], entry["position"]) == (True, length + record)
    assert entry["score"] == pytest.approx(scores[record], abs=1e-4)


async def test_a_prompt_that_fires_is_not_answered(
    http: httpx.AsyncClient, chat: Body, armed: dict[str, Detector]
) -> None:
    asked = {"name": "odd", "action": "stop", "tokens": "prompt", "threshold": -1e9}
    body = chat(detectors=[asked], steering={"interventions": [{"kind": "add", "vector": "joy"}]})
    found = (await answer(http, body)).json()
    choice = found["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "content_filter")
    (entry,) = found["detections"]
    assert (entry["position"], entry["fired"]) == (1, True)
    fed = found["steering"]["tokens_steered"] + found["steering"]["tokens_skipped"]
    assert fed == found["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", ["generated", "prompt"])
async def test_the_token_that_is_kept_back_is_in_no_read_out(
    http: httpx.AsyncClient,
    chat: Body,
    sse: Sse,
    armed: dict[str, Detector],
    tokens: str,
    stream: bool,
) -> None:
    """Its `kl` is known in the pass in which the detector fires, and would name it."""
    asked = {"name": "odd", "action": "stop", "tokens": tokens, "threshold": -1e9}
    joy = {"interventions": [{"kind": "add", "vector": "joy"}]}
    read = {"kl": True, "norms": [2]}
    body = chat(detectors=[asked], steering=joy, inspect=read, stream=stream, max_tokens=5)
    response = await answer(http, body)
    if stream:
        parts = [chunk.get("steering", {}) for chunk in sse(response.text)]
        entries = [one for part in parts for one in part.get("readouts", [])]
    else:
        entries = response.json()["steering"].get("readouts", [])
    # One token is shown where generated tokens are watched, and none where the prompt is.
    assert ["kl" in one and "norms" in one for one in entries] == [True] * (tokens == "generated")


async def test_choices_are_watched_each_by_itself_and_beside_read_outs(
    http: httpx.AsyncClient, engine: FakeEngine, armed: dict[str, Detector]
) -> None:
    body = {
        "model": "fake-model",
        "prompt": ["A fox", "An owl"],
        "n": 2,
        "seed": 1,
        "max_tokens": 8,
        "detectors": [
            {"name": "odd", "tokens": "all"},
            {"name": "slow", "action": "stop", "threshold": 1e9},
        ],
        "inspect": {"norms": [1]},
    }
    found = (await answer(http, body, TEXT)).json()
    names = [(one["choice"], one["name"]) for one in found["detections"]]
    assert names == [(n, name) for n in range(4) for name in ("odd", "slow")]
    entries = found["steering"]["readouts"]
    assert len(entries) == 4 * 7
    assert all(
        set(one) == {"choice", "position", "token", "id", "phase", "norms"} for one in entries
    )
    assert {one["phase"] for one in entries} == {"generation"}


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_say_why_they_are_incomplete(
    http: httpx.AsyncClient, armed: dict[str, Detector], sse: Sse, stream: bool
) -> None:
    asked = {"name": "odd", "action": "stop", "threshold": -1e9}
    body = {"model": "fake-model", "input": "Hi", "detectors": [asked], "stream": stream}
    response = await answer(http, body, RESPONSES)
    if stream:
        last = [line for line in response.text.splitlines() if line.startswith("data: {")][-1]
        found = json.loads(last.removeprefix("data: "))["response"]
    else:
        found = response.json()
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "content_filter"}
    assert len(found["output"][0]["content"][0]["text"]) == 1
    assert found["detections"][0]["fired"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"detectors": [{"name": "nobody"}]}, "/detectors/0/name", "unknown_detector"),
        (
            {"detectors": [{"name": "odd"}, {"name": "odd"}]},
            "/detectors/1/name",
            "duplicate_detector",
        ),
        ({"detectors": [{"name": "odd", "action": "shout"}]}, "/detectors/0/action", None),
        ({"detectors": [{"name": "odd", "tokens": "some"}]}, "/detectors/0/tokens", None),
        ({"detectors": [{"name": "odd", "threshold": "1"}]}, "/detectors/0/threshold", None),
        ({"detectors": [{"name": "odd", "more": 1}]}, "/detectors/0/more", "unknown_field"),
        ({"detectors": [{"name": f"d{n}"} for n in range(17)]}, "/detectors", None),
        ({"detectors": [{"name": "wide"}]}, "/detectors/0/name", "wrong_width"),
        ({"detectors": [{"name": "deep"}]}, "/detectors/0/name", "layer_out_of_range"),
        (
            {
                "detectors": [{"name": "odd"}],
                "compare": True,
                "steering": {"interventions": [{"kind": "add", "vector": "joy"}]},
            },
            "/compare",
            "unsupported_parameter",
        ),
    ],
)
async def test_what_is_wrong_is_said_at_its_field(
    http: httpx.AsyncClient,
    registry: Registry,
    chat: Body,
    armed: dict[str, Detector],
    fields: dict[str, Any],
    param: str,
    code: str | None,
) -> None:
    registry.add("wide", random_detector(1, 2, width=17))
    registry.add("deep", random_detector(1, 99))
    error = (await http.post(CHAT, json=chat(**fields))).json()["error"]
    assert (error["param"], error["code"]) == (param, code or "invalid_value"), error


async def test_what_the_operator_arms_watches_every_request_and_cannot_be_disarmed(
    registry: Registry, engine: FakeEngine, chat: Body, armed: dict[str, Detector]
) -> None:
    settings = ServerSettings(engine="fake", model="fake-model", detectors=("odd:stop",))
    odd = armed["odd"]
    registry.add("odd", Detector.of(odd.direction, layer=2, threshold=-1e9, model="fake-model"))
    app: FastAPI = create_app(engine, registry, settings)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        for fields in ({}, {"detectors": [{"name": "odd", "threshold": 1e9}]}):
            found = (await answer(http, chat(**fields))).json()
            assert found["choices"][0]["finish_reason"] == "content_filter"
            (entry,) = found["detections"]
            assert (entry["action"], entry["fired"]) == ("stop", True)
        both = chat(compare=True, steering={"interventions": [{"kind": "add", "vector": "joy"}]})
        assert (await http.post(CHAT, json=both)).json()["error"]["param"] == "/compare"
        registry.remove("detector", "odd")
        refused = (await http.post(CHAT, json=chat())).json()["error"]
        assert (refused["code"], refused["param"]) == ("unknown_detector", None)


SPEC = {"interventions": [{"kind": "add", "vector": "joy"}]}
PROFILES = "/v1/steering/profiles"


async def save_profile(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post(PROFILES, json={"name": "watched", "spec": SPEC, **fields})


async def test_a_profiles_detectors_watch_whoever_uses_it_and_cannot_be_disarmed(
    http: httpx.AsyncClient, chat: Body, armed: dict[str, Detector]
) -> None:
    mine = {"name": "odd", "action": "stop", "tokens": "generated", "threshold": -1e9}
    saved = await save_profile(http, detectors=[mine])
    assert saved.json()["detectors"] == [mine]
    assert (await http.get(f"{PROFILES}/watched")).json()["detectors"] == [mine]
    slow = {"name": "slow", "threshold": 1e9}
    for fields in ({}, {"detectors": [{"name": "odd", "threshold": 1e9}, slow]}):
        body = chat(model="fake-model:watched", max_tokens=5, **fields)
        found = (await answer(http, body)).json()
        assert found["choices"][0]["finish_reason"] == "content_filter"
        told = [(one["name"], one["action"], one["threshold"]) for one in found["detections"]]
        assert told == [("odd", "stop", -1e9), ("slow", "tag", 1e9)][: 1 + len(fields)]
    assert "detections" not in (await answer(http, chat(steering=SPEC))).json()
    both = chat(model="fake-model:watched", compare=True)
    assert (await http.post(CHAT, json=both)).json()["error"]["param"] == "/compare"
    refused = await http.delete("/v1/steering/detectors/odd")
    assert refused.json()["error"]["code"] == "in_use"


@pytest.mark.parametrize(
    ("detectors", "param", "code"),
    [
        ([{"name": "od"}], "/detectors/0/name", "unknown_detector"),
        ([{"name": "odd"}, {"name": "odd"}], "/detectors/1/name", "duplicate_detector"),
        ([{"name": "odd", "action": "shout"}], "/detectors/0/action", "invalid_value"),
        ([{"name": "wide"}], "/detectors/0/name", "wrong_width"),
        ([{"name": "odd"}] * 17, "/detectors", "invalid_value"),
    ],
)
async def test_a_profile_whose_detectors_cannot_watch_is_not_saved(
    http: httpx.AsyncClient,
    registry: Registry,
    armed: dict[str, Detector],
    detectors: list[dict[str, Any]],
    param: str,
    code: str,
) -> None:
    registry.add("wide", random_detector(1, 2, width=17))
    error = (await save_profile(http, detectors=detectors)).json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert (await http.get(f"{PROFILES}/watched")).status_code == 404


async def test_what_server_and_profile_arm_both_watch(
    registry: Registry, engine: FakeEngine, chat: Body, armed: dict[str, Detector]
) -> None:
    settings = ServerSettings(engine="fake", model="fake-model", detectors=("odd", "slow"))
    transport = httpx.ASGITransport(app=create_app(engine, registry, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        stricter = {"name": "odd", "action": "stop", "threshold": -1e9}
        await save_profile(http, detectors=[{"name": "slow"}, stricter])
        body = chat(model="fake-model:watched", detectors=[{"name": "odd", "threshold": 9.0}])
        found = (await answer(http, body)).json()
    told = [(one["name"], one["action"]) for one in found["detections"]]
    assert told == [("odd", "tag"), ("slow", "tag"), ("odd", "stop")]
    assert found["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    ("detector", "code", "said"),
    [
        ("od", "unknown_detector", "did you mean 'odd'"),
        ("wide", "wrong_width", "has width 17"),
    ],
)
async def test_a_gate_by_a_detector(
    http: httpx.AsyncClient,
    registry: Registry,
    chat: Body,
    armed: dict[str, Detector],
    detector: str,
    code: str,
    said: str,
) -> None:
    registry.add("wide", random_detector(1, 2, width=17))
    spec = {"interventions": [{"kind": "add", "vector": "joy", "layers": [3]}]}
    for name in ("odd", "slow"):
        named = f"{name}@{armed[name].sha256[:8]}"
        steered = chat(steering={**spec, "when": {"detector": named}})
        found = (await answer(http, steered)).json()
        assert [gate["name"] for gate in found["steering"]["gates"]] == [name]
    body = chat(steering={**spec, "when": {"detector": detector}})
    error = (await http.post(CHAT, json=body)).json()["error"]
    assert (error["code"], error["param"]) == (code, "/steering/when/detector")
    assert said in error["message"]


async def test_fires_and_scores_are_counted_by_known_names(
    app: FastAPI, http: httpx.AsyncClient, chat: Body, armed: dict[str, Detector]
) -> None:
    await answer(http, chat(detectors=[{"name": "odd", "threshold": -1e9}, {"name": "slow"}]))
    await http.post(CHAT, json=chat(detectors=[{"name": "nobody"}]))
    text = (await http.get("/metrics")).text
    assert 'steer_detector_fires_total{action="tag",detector="odd"} 1.0' in text
    assert 'steer_detector_score_logits_count{detector="slow"} 1.0' in text
    assert "nobody" not in text
