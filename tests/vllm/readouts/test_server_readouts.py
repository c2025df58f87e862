"""Read-outs over HTTP on vLLM's server: whole, streamed, refused by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from liveness import LIVENESS_SECONDS
from vllm_server import running_server

MODEL = "steer-demo"
ALL = {"phases": ["prompt", "generation"]}
FRENCH = {"interventions": [{"kind": "add", "vector": "french", "where": ALL}]}
ASKED: dict[str, Any] = {
    "projections": [{"vector": "french", "layers": [3, 5]}],
    "features": [{"sae": "resid-3", "top": 3}, {"sae": "resid-3", "features": [1, 7]}],
    "lens": {"layers": [2, 5], "top": 2},
    "norms": [3],
    "tokens": "all",
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    registry = tmp_path_factory.mktemp("server") / "registry"
    with (
        running_server(registry, STEER_MEASURED_SHARE="0", STEER_READOUT_VALUES="100000") as url,
        httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as client,
    ):
        yield client


def body(question: str = "How are you today?", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12, **fields}


def answer(http: httpx.Client, content: dict[str, Any], route: str = "chat/completions") -> Any:
    response = http.post(f"/v1/{route}", json=content)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(http: httpx.Client, content: dict[str, Any]) -> list[dict[str, Any]]:
    response = http.post("/v1/chat/completions", json={**content, "stream": True})
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("steering", [None, FRENCH])
def test_they_equal_an_offline_capture(http: httpx.Client, steering: Any) -> None:
    steered = {} if steering is None else {"steering": steering}
    found = answer(http, body(inspect=ASKED, **steered))["steering"]
    entries = found["readouts"]
    assert ("fingerprint" in found) == (steering is not None)
    assert [one["position"] for one in entries] == list(range(len(entries)))
    asked = {
        "tokens": [one["id"] for one in entries],
        "vectors": ["french"],
        "layers": [3, 5],
        "positions": "all",
        "sae": "resid-3",
        "top_features": 3,
        **steered,
    }
    offline = answer(http, asked, "inspect/activations")
    along = {one["layer"]: one["projections"] for one in offline["vectors"]}
    norms = next(one["norms"] for one in offline["layers"] if one["layer"] == 3)
    for place, one in enumerate(entries):
        for reading in one["projections"]:
            wanted = along[reading["layer"]][place]
            assert reading["value"] == pytest.approx(wanted, abs=1e-4)
        assert one["norms"][0]["value"] == pytest.approx(norms[place], abs=1e-4)
        ranked, named = one["features"]
        wanted_top = offline["features"]["top"][place]
        assert [each["feature"] for each in ranked["top"]] == [w["feature"] for w in wanted_top]
        for mine, theirs in zip(ranked["top"], wanted_top, strict=True):
            assert mine["activation"] == pytest.approx(theirs["activation"], abs=1e-4)
        assert [each["feature"] for each in named["features"]] == [1, 7]


def test_a_stream_says_the_same_chunk_by_chunk(http: httpx.Client) -> None:
    content = body(inspect=ASKED, steering=FRENCH)
    whole = answer(http, content)["steering"]
    streamed = chunks(http, content)
    parts = [one["steering"].get("readouts", []) for one in streamed if "steering" in one]
    assert len([one for one in parts if one]) > 3
    together = [entry for part in parts for entry in part]
    assert [one["id"] for one in together] == [one["id"] for one in whole["readouts"]]
    for mine, theirs in zip(together, whole["readouts"], strict=True):
        for one, other in zip(mine["projections"], theirs["projections"], strict=True):
            assert one["value"] == pytest.approx(other["value"], abs=1e-4)
    assert streamed[-1]["steering"]["tokens_steered"] == whole["tokens_steered"]


@pytest.mark.parametrize("more", [{}, {"norms": [3], "tokens": "all"}])
def test_divergences_come_with_the_answer(http: httpx.Client, more: dict[str, Any]) -> None:
    """Whole, each beside what else is read of its token; in a stream all of them in one chunk, when
    the last token has come."""
    content = body(inspect={"kl": True, **more}, steering=FRENCH, n=2, temperature=0.9, seed=3)
    whole = answer(http, content)
    found = whole["steering"]["readouts"]
    by_choice = [[e for e in found if e["choice"] == n and "kl" in e] for n in (0, 1)]
    assert sum(map(len, by_choice)) == whole["usage"]["completion_tokens"]
    for mine in by_choice:
        assert all(one["phase"] == "generation" for one in mine)
        assert max(one["kl"] for one in mine) > 1e-3
    places = [(one["choice"], one["position"]) for one in found]
    assert len(places) == len(set(places))
    streamed = chunks(http, content)
    parts = [one["steering"].get("readouts", []) for one in streamed if "steering" in one]
    assert [any("kl" in e for e in part) for part in parts].count(True) == 1
    late = {(e["choice"], e["position"]): e["kl"] for part in parts for e in part if "kl" in e}
    told = {(e["choice"], e["position"]): e["kl"] for mine in by_choice for e in mine}
    assert late == pytest.approx(told, abs=1e-4)
    if more:  # which came before, in as many chunks as there was time for
        entries = [(e["choice"], e["position"]) for part in parts for e in part if "norms" in e]
        assert len(entries) == len(set(entries)) > len(told)


def test_many_streams_beside_ordinary_traffic(http: httpx.Client) -> None:
    """Every stream has its own tokens once, and those that ask for nothing get nothing."""

    def choices(number: int) -> int:
        return 1 + number // 2 % 2

    def one(number: int) -> list[dict[str, Any]]:
        asked = {"inspect": {"norms": [1], "tokens": "all"}} if number % 2 else {}
        steered = {"steering": FRENCH} if number % 3 == 0 else {}
        sampled = {"n": choices(number), "temperature": 0.7, "seed": number}
        return chunks(http, body(f"Tell me about {number}", **sampled, **asked, **steered))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(16)))
    for number, streamed in enumerate(found):
        entries = [e for c in streamed for e in c.get("steering", {}).get("readouts", [])]
        if number % 2 == 0:
            assert entries == []
            continue
        for choice in range(choices(number)):
            mine = [entry["position"] for entry in entries if entry["choice"] == choice]
            assert mine == list(range(len(mine)))
            assert len(mine) > 5


@pytest.mark.parametrize("divergence", [False, True])
def test_a_stop_string_ends_them_with_the_answer(http: httpx.Client, divergence: bool) -> None:
    """The engine goes on for a token or two that nobody hears of."""
    asked = {"norms": [1], **({"kl": True} if divergence else {})}
    spec = {"interventions": [{"kind": "add", "vector": "french"}]}
    content = body("What is the capital of France?", inspect=asked, steering=spec)
    whole = answer(http, content)["steering"]["readouts"]
    stopping = {**content, "stop": [" est"]}
    stopped = answer(http, stopping)
    entries = stopped["steering"]["readouts"]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert 3 < len(entries) < len(whole)
    assert len(entries) == stopped["usage"]["completion_tokens"] - (not divergence)
    streamed = chunks(http, stopping)
    parts = [e for c in streamed for e in c.get("steering", {}).get("readouts", []) if "norms" in e]
    norms = {e["position"]: e["norms"][0]["value"] for e in entries if "norms" in e}
    assert [e["position"] for e in parts] == list(norms)
    assert {e["position"]: e["norms"][0]["value"] for e in parts} == pytest.approx(norms)


@pytest.mark.parametrize(
    ("route", "content", "param"),
    [
        ("chat/completions", body(inspect={"kl": True}), "/inspect/kl"),
        ("chat/completions", body(inspect={"norms": [6]}), "/inspect/norms"),
        (
            "chat/completions",
            body(inspect={"projections": [{"vector": "nobody"}]}, stream=True),
            "/inspect/projections/0/vector",
        ),
        (
            "chat/completions",
            body(inspect={"lens": {"layers": [0, 1, 2], "top": 90}}, max_tokens=200),
            "/inspect/tokens",
        ),
        (
            "responses",
            {"model": MODEL, "input": "Hello", "stream": True, "inspect": {"norms": [1]}},
            "/inspect",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_field(
    http: httpx.Client, route: str, content: dict[str, Any], param: str
) -> None:
    response = http.post(f"/v1/{route}", json=content)
    assert response.status_code in (400, 413), response.text
    assert response.json()["error"]["param"] == param


def test_a_response_carries_them_whole(http: httpx.Client) -> None:
    content = {"model": MODEL, "input": "Hello", "inspect": {"norms": [1]}, "max_output_tokens": 4}
    assert answer(http, content, "responses")["steering"]["readouts"]


def test_the_numbers_are_counted(http: httpx.Client) -> None:
    answer(http, body(inspect={"norms": [1]}))
    assert 'steer_readout_values_total{reading="norms"}' in http.get("/metrics").text
