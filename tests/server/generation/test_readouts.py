"""Read-outs on requests: whole and streamed, their limits, and what is refused by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import FakeEngine
from steer.errors import TooLarge
from steer.model import HookPoint
from steer.readouts.measures import unit
from steer.readouts.plan import ReadoutPlan
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.generation.inspection.readouts import check_amount
from steer_server.settings import ServerSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
Body = Callable[..., dict[str, Any]]
Sse = Callable[[str], list[dict[str, Any]]]

ASKED: dict[str, Any] = {
    "projections": [{"vector": "joy", "layers": [2]}],
    "features": [{"sae": "features", "top": 2}, {"sae": "features", "features": [5, 0]}],
    "lens": {"layers": [1, 4], "top": 3},
    "norms": [0],
    "tokens": "all",
}


async def answer(http: httpx.AsyncClient, body: dict[str, Any], url: str = CHAT) -> dict[str, Any]:
    response = await http.post(url, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_whole_answer_lists_every_token_that_was_fed(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    found = await answer(http, chat(inspect=ASKED, max_tokens=4))
    entries = found["steering"]["readouts"]
    length = found["usage"]["prompt_tokens"]
    assert set(found["steering"]) == {"readouts"}
    assert [one["position"] for one in entries] == list(range(length + 3))
    phases = ["prompt"] * length + ["generation"] * 3
    assert [one["phase"] for one in entries] == phases
    (request,) = engine.seen
    assert [one["id"] for one in entries[:length]] == list(request.prompt)
    first = entries[0]
    assert set(first) == {
        *("choice", "position", "token", "id", "phase"),
        *("projections", "features", "lens", "norms"),
    }
    assert [one["layer"] for one in first["lens"]] == [1, 4]
    assert [len(one["top"]) for one in first["lens"]] == [3, 3]
    assert [one["feature"] for one in first["features"][1]["features"]] == [5, 0]
    assert first["features"][1]["features"][0]["label"]["text"] == "French cities"


async def test_the_numbers_are_those_of_the_states(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine, registry: Registry
) -> None:
    found = await answer(http, chat(inspect=ASKED, max_tokens=4))
    entries = found["steering"]["readouts"]
    tokens = tuple(one["id"] for one in entries)
    (captured,) = engine.capture(CaptureRequest([tokens], (HookPoint(0), HookPoint(2))))
    along = captured.states[HookPoint(2)] @ unit(registry.vector("joy").directions[2])
    norms = captured.states[HookPoint(0)].norm(dim=-1)
    for place, one in enumerate(entries):
        assert one["projections"][0]["value"] == pytest.approx(float(along[place]), abs=1e-5)
        assert one["norms"][0]["value"] == pytest.approx(float(norms[place]), abs=1e-5)


@pytest.mark.parametrize("usage", [None, {"include_usage": True}])
@pytest.mark.parametrize("steered", [False, True])
async def test_a_stream_says_the_same_chunk_by_chunk(
    http: httpx.AsyncClient,
    chat: Body,
    sse: Sse,
    joy: dict[str, Any],
    steered: bool,
    usage: dict[str, Any] | None,
) -> None:
    body = chat(inspect=ASKED, max_tokens=9, **({"steering": joy} if steered else {}))
    whole = await answer(http, body)
    response = await http.post(CHAT, json={**body, "stream": True, "stream_options": usage})
    chunks = sse(response.text)
    streamed = [chunk["steering"].get("readouts", []) for chunk in chunks if "steering" in chunk]
    assert len([entries for entries in streamed if entries]) > 3
    together = [one for entries in streamed for one in entries]
    assert together == whole["steering"]["readouts"]
    last = {k: v for k, v in chunks[-1].get("steering", {}).items() if k != "readouts"}
    assert last == {k: v for k, v in whole["steering"].items() if k != "readouts"}


async def test_choices_and_prompts_have_entries_of_their_own(http: httpx.AsyncClient) -> None:
    body = {"model": "fake-model", "prompt": ["one", "other"], "n": 2, "max_tokens": 3}
    found = await answer(http, {**body, "inspect": {"norms": [1]}}, TEXT)
    choices = [one["choice"] for one in found["steering"]["readouts"]]
    assert choices == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_sizes_say_where_the_steering_acts(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    body = chat(steering=joy, inspect={"relative_size": True}, max_tokens=3)
    for one in (await answer(http, body))["steering"]["readouts"]:
        assert {size["layer"] for size in one["relative_size"]} == {2, 3}
        assert all(size["value"] > 0 for size in one["relative_size"])


@pytest.mark.parametrize("beside", [{}, {"norms": [1]}])
async def test_every_generated_token_has_its_divergence(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], beside: dict[str, Any]
) -> None:
    found = await answer(http, chat(steering=joy, inspect={"kl": True, **beside}, max_tokens=4))
    entries = found["steering"]["readouts"]
    length = found["usage"]["prompt_tokens"]
    assert [one["position"] for one in entries] == [length + n for n in range(4)]
    assert all(one["kl"] >= 0 for one in entries)
    assert ["norms" in one for one in entries] == [bool(beside)] * 3 + [False]


async def test_compared_choices_are_not_read(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], engine: FakeEngine
) -> None:
    body = chat(steering=joy, compare=True, inspect={"norms": [1]}, max_tokens=3)
    found = await answer(http, body)
    assert [one["choice"] for one in found["steering"]["readouts"]] == [0, 0]
    assert [request.readouts is None for request in engine.seen] == [False, True]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"norms": [9]}, "/inspect/norms", "layer_out_of_range"),
    ({"norms": "every"}, "/inspect/norms", "invalid_value"),
    ({"norms": [1], "layers": [1]}, "/inspect/layers", "unknown_field"),
    ({"tokens": "some", "norms": [1]}, "/inspect/tokens", "invalid_value"),
    ({"tokens": "all"}, "/inspect", "nothing_to_read"),
    ({"projections": [{"vector": "no"}]}, "/inspect/projections/0/vector", "unknown_vector"),
    ({"projections": [{"vector": "wide"}]}, "/inspect/projections/0/vector", "wrong_width"),
    (
        {"projections": [{"vector": "joy", "layers": [5]}]},
        "/inspect/projections/0/layers",
        "layer_not_in_vector",
    ),
    ({"features": [{"sae": "no"}]}, "/inspect/features/0/sae", "unknown_sae"),
    (
        {"features": [{"sae": "features", "features": [1, 8]}]},
        "/inspect/features/0/features/1",
        "feature_out_of_range",
    ),
    (
        {"features": [{"sae": "features", "features": [1], "top": 3}]},
        "/inspect/features/0",
        "invalid_value",
    ),
    ({"lens": {"layers": [1, 6]}}, "/inspect/lens/layers", "layer_out_of_range"),
    ({"lens": {"layers": [1], "lens": "no"}}, "/inspect/lens/lens", "unknown_lens"),
    ({"lens": {"layers": [1], "top": 101}}, "/inspect/lens/top", "invalid_value"),
    ({"relative_size": True}, "/inspect/relative_size", "nothing_to_compare"),
    ({"kl": True}, "/inspect/kl", "nothing_to_compare"),
]


@pytest.mark.parametrize(("asked", "param", "code"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_is_refused_by_field(
    http: httpx.AsyncClient,
    chat: Body,
    asked: dict[str, Any],
    param: str,
    code: str,
    stream: bool,
) -> None:
    response = await http.post(CHAT, json=chat(inspect=asked, stream=stream))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


LIMITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"readout_layers": 2}, {"norms": [0, 1, 2]}, "/inspect/norms"),
    ({"readout_layers": 2}, {"lens": {"layers": [0, 1, 2]}}, "/inspect/lens/layers"),
    ({"readout_numbers": 8}, {"norms": [0], "lens": {"layers": [1], "top": 4}}, "/inspect/lens"),
    ({"readout_values": 20}, {"norms": [0, 1], "tokens": "all"}, "/inspect/tokens"),
]


@pytest.mark.parametrize(("limits", "asked", "param"), LIMITS)
async def test_more_than_the_server_reads_is_refused(
    engine: FakeEngine,
    registry: Registry,
    settings: ServerSettings,
    in_process: Callable[[FastAPI], httpx.AsyncClient],
    chat: Body,
    limits: dict[str, Any],
    asked: dict[str, Any],
    param: str,
) -> None:
    app = create_app(engine, registry, settings.model_copy(update=limits))
    async with in_process(app) as http:
        response = await http.post(CHAT, json=chat(inspect=asked, max_tokens=9))
        error = response.json()["error"]
    assert (response.status_code, error["param"]) == (413, param)
    assert error["code"] == "too_many_readouts"


async def test_numbers_are_counted_by_what_asked_for_them(
    http: httpx.AsyncClient, chat: Body, app: FastAPI
) -> None:
    found = await answer(http, chat(inspect=ASKED, max_tokens=4))
    tokens = len(found["steering"]["readouts"])
    text = (await http.get("/metrics")).text
    each = {"projections": 1, "features": 2 * 2 + 2, "lens": 2 * (2 * 3 + 1), "norms": 1}
    for field, count in each.items():
        assert f'steer_readout_values_total{{reading="{field}"}} {float(tokens * count)}' in text


async def test_a_stream_of_a_response_has_no_room_for_them(http: httpx.AsyncClient) -> None:
    body = {"model": "fake-model", "input": "How are you?", "inspect": {"norms": [1]}}
    whole = await answer(http, body, "/v1/responses")
    assert whole["steering"]["readouts"]
    refused = await http.post("/v1/responses", json={**body, "stream": True})
    assert refused.json()["error"]["param"] == "/inspect"
    assert json.loads(refused.text)["error"]["code"] == "unsupported_parameter"


async def test_all_layers_are_those_that_can_be_read(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    """As in a spec: of a vector with rows its own, else the model's."""
    every = list(range(engine.info.n_layers))
    rows = [2, 3]
    asked = {"lens": {"layers": "all", "top": 1}, "norms": "all"}
    asked |= {"projections": [{"vector": "joy", "layers": "all"}]}
    named = {"lens": {"layers": every, "top": 1}, "norms": every}
    named |= {"projections": [{"vector": "joy", "layers": rows}]}
    found, same = [
        (await answer(http, chat(inspect=one, max_tokens=3)))["steering"]["readouts"]
        for one in (asked, named)
    ]
    assert [one["layer"] for one in found[0]["lens"]] == every
    assert [one["layer"] for one in found[0]["projections"]] == rows
    assert found == same


def test_states_that_wait_for_a_twin_are_counted() -> None:
    """Where `kl` comes when the answer is complete, its states are kept until then."""
    kl, norms = ReadoutPlan((), ("kl",)), ReadoutPlan((), ("norms",))
    check_amount(1000, kl, prompt=5, generated=5, kept=200)
    check_amount(1000, norms, prompt=5, generated=900, kept=200)
    check_amount(1000, kl, prompt=5, generated=900)
    with pytest.raises(TooLarge, match="states of 6 tokens, 200 numbers each") as caught:
        check_amount(1000, kl, prompt=5, generated=6, kept=200)
    assert (caught.value.code, caught.value.param) == ("too_many_readouts", "/inspect/kl")


@pytest.mark.parametrize(("tokens", "entries"), [("all", 3), ("prompt", 3), ("generated", 0)])
async def test_a_scored_text_has_no_entry_behind_its_end(
    http: httpx.AsyncClient, joy: dict[str, Any], tokens: str, entries: int
) -> None:
    """`"max_tokens": 0` generates nothing that could be told of."""
    body = {"model": "fake-model", "prompt": [82, 97, 105], "echo": True, "max_tokens": 0}
    body |= {"steering": joy, "inspect": {"norms": [1], "kl": True, "tokens": tokens}}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found = response.json()["steering"].get("readouts", [])
    assert [one["position"] for one in found] == list(range(entries))
    assert not any("kl" in one for one in found)
