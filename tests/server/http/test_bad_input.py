"""What is wrong with a request is said with a 4xx, a code and a place; the server goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from safetensors.torch import save
from torch import full, ones, zeros

from steer.engines.fake.controls import FakeFailure
from steer.engines.fake.engine import FakeEngine
from steer.errors import CapacityError
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

URL = "/v1/chat/completions"
Body = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
async def still_healthy(http: httpx.AsyncClient, chat: Body) -> AsyncIterator[None]:
    """After every test here the server answers as before."""
    before = (await http.post(URL, json=chat())).json()["choices"]
    yield
    assert (await http.get("/health")).json()["status"] == "ok"
    assert (await http.post(URL, json=chat())).json()["choices"] == before
    assert (await http.get("/metrics")).status_code == 200


def refusal(response: httpx.Response, status: int | None = None) -> dict[str, Any]:
    """The error object, once it has OpenAI's form."""
    assert 400 <= response.status_code < 500, response.text
    if status is not None:
        assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code", "param", "request_id"}
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["code"]
    assert len(body["error"]["message"]) > 10
    return body["error"]


def inline(tensor: Any) -> dict[str, Any]:
    return {"layer": 2, "data": base64.b64encode(save({"layers.2": tensor})).decode()}


AT = "/steering/interventions/0"
ADD: dict[str, Any] = {"kind": "add", "vector": "joy"}
SPECS: list[tuple[Any, str, str]] = [
    ({"kind": "add", "vector": "missing"}, "unknown_vector", AT + "/vector"),
    ({"kind": "add", "vector": "joy@abcdef12"}, "unknown_vector", AT + "/vector"),
    ({"kind": "add", "vector": "wide"}, "wrong_width", AT + "/vector"),
    ({"kind": "add", "vector": "deep"}, "layer_out_of_range", AT + "/vector"),
    ({"kind": "add", "vector": "joy", "layers": [77]}, "layer_out_of_range", AT + "/layers"),
    ({"kind": "add", "vector": "joy", "layers": [-1]}, "invalid_spec", AT + "/layers/0"),
    ({"kind": "add", "vector": "joy", "layers": []}, "invalid_spec", AT + "/layers"),
    ({"kind": "add", "vector": "../etc"}, "invalid_spec", AT + "/vector"),
    ({"kind": "add", "vector": "joy", "strength": "x"}, "invalid_spec", AT + "/strength"),
    ({"kind": "add", "vector": "joy", "strength": True}, "invalid_spec", AT + "/strength"),
    ({"kind": "add", "vector": "joy", "colour": 1}, "unknown_field", AT + "/colour"),
    ({"kind": "ad", "vector": "joy"}, "invalid_spec", AT),
    ({"vector": "joy"}, "invalid_spec", AT),
    (7, "invalid_spec", AT),
    (
        {"kind": "add", "vector": "joy", "where": {"phases": ["later"]}},
        "invalid_spec",
        AT + "/where/phases/0",
    ),
    (
        {"kind": "add", "vector": "joy", "where": {"positions": [[5, 2]]}},
        "invalid_spec",
        AT + "/where",
    ),
    ({"kind": "clamp", "sae": "none", "features": [1], "value": 1}, "unknown_sae", AT + "/sae"),
    (
        {"kind": "clamp", "sae": "features", "features": [8], "value": 1},
        "feature_out_of_range",
        AT + "/features",
    ),
]


@pytest.mark.parametrize(("item", "code", "param"), SPECS)
async def test_a_wrong_intervention_is_named(
    http: httpx.AsyncClient, chat: Body, item: Any, code: str, param: str
) -> None:
    body = chat(steering={"interventions": [item]})
    error = refusal(await http.post(URL, json=body))
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (URL, {"steering": {"interventions": [ADD | {"layers": [0, -1]}]}}, f"{AT}/layers/1"),
        (URL, {"inspect": {"norms": [-1]}}, "/inspect/norms/0"),
        (URL, {"inspect": {"lens": {"layers": [-1]}}}, "/inspect/lens/layers/0"),
        ("/v1/inspect/activations", {"text": "a", "layers": [-1]}, "/layers/0"),
        ("/v1/inspect/weights", {"layer": -1, "neuron": 0}, "/layer"),
        (
            "/v1/steering/profiles",
            {"name": "end", "spec": {"interventions": [ADD | {"layers": [-1]}]}},
            "/spec/interventions/0/layers/0",
        ),
        (
            "/v1/steering/fit",
            {"name": "x", "pairs": [{"positive": "a", "negative": "b"}], "layers": [-1]},
            "/layers/0",
        ),
    ],
)
async def test_a_layer_counted_from_the_end_is_told_its_number(
    http: httpx.AsyncClient,
    chat: Body,
    engine: FakeEngine,
    url: str,
    body: dict[str, Any],
    param: str,
) -> None:
    error = refusal(await http.post(url, json=chat(**body) if url == URL else body), 400)
    assert error["param"] == param
    assert f"so write {engine.info.n_layers - 1}" in error["message"]


async def test_a_layer_that_lies_before_the_first_is_told_which_there_are(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    body = chat(steering={"interventions": [ADD | {"layers": [-40]}]})
    error = refusal(await http.post(URL, json=body), 400)
    assert f"write one from 0 to {engine.info.n_layers - 1}" in error["message"]


async def test_validate_tells_the_number_too(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    spec = {"interventions": [ADD | {"layers": [-2]}]}
    answer = await http.post("/v1/steering/validate", json={"steering": spec})
    (problem,) = answer.json()["problems"]
    assert problem["message"].endswith(f"so write {engine.info.n_layers - 2}")


@pytest.mark.parametrize(
    ("url", "field", "said"),
    [
        (URL, "sterring", "a spec is the field 'steering', an object with a list 'interventions'"),
        (URL, "steer_vector_request", "a spec is the field 'steering'"),
        (URL, "interventions", "a spec is the field 'steering'"),
        (URL, "detector", "the field is 'detectors'"),
        (URL, "max_token", "the field is 'max_tokens'"),
        (URL, "hovercraft", "remove it"),
        ("/v1/inspect/activations", "layer", "the field is 'layers'"),
        ("/v1/steering/profiles", "specs", "the field is 'spec'"),
        ("/v1/steering/profiles", "steering", "the field is 'spec'"),
        ("/v1/inspect/activations", "hovercraft", "remove it; the fields here are "),
        (URL, "spec", "a spec is the field 'steering'"),
    ],
)
async def test_an_unknown_field_is_told_what_it_is_a_slip_of_the_pen_for(
    http: httpx.AsyncClient, chat: Body, url: str, field: str, said: str
) -> None:
    given = {
        URL: chat(),
        "/v1/inspect/activations": {"text": "a"},
        "/v1/steering/profiles": {"name": "n", "spec": {"interventions": [ADD]}},
    }[url]
    error = refusal(await http.post(url, json=given | {field: [1]}), 400)
    assert (error["code"], error["param"]) == ("unknown_field", f"/{field}")
    assert f"unknown field {field!r}: {said}" in error["message"]


@pytest.mark.parametrize(
    ("item", "name", "said"),
    [
        ({"pos": "a", "neg": "b"}, "pos", "positive"),
        ({"chosen": "a", "rejected": "b"}, "chosen", "positive"),
        ({"positve": "a", "negative": "b"}, "positve", "positive"),
    ],
)
async def test_what_is_misspelt_is_told_before_what_is_missing(
    http: httpx.AsyncClient, item: Body, name: str, said: str
) -> None:
    body = {"name": "n", "layers": [1], "pairs": [item]}
    error = refusal(await http.post("/v1/steering/fit", json=body), 400)
    assert (error["code"], error["param"]) == ("unknown_field", f"/pairs/0/{name}")
    assert f"the field is {said!r}" in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "at", "said"),
    [
        ("steering", {"interventions": [ADD | {"coeff": 2}]}, "/interventions/0/coeff", "strength"),
        ("steering", {"interventions": [ADD], "wher": {}}, "/wher", "where"),
        ("inspect", {"norms": [1], "token": "all"}, "/token", "tokens"),
        ("inspect", {"lens": {"layers": [1], "topk": 3}}, "/lens/topk", "top"),
        ("detectors", [{"name": "rude", "treshold": 2}], "/0/treshold", "threshold"),
    ],
)
async def test_an_unknown_field_inside_another_is_told_as_well(
    http: httpx.AsyncClient, chat: Body, field: str, value: Any, at: str, said: str
) -> None:
    error = refusal(await http.post(URL, json=chat(**{field: value})), 400)
    assert (error["code"], error["param"]) == ("unknown_field", f"/{field}{at}")
    assert f"the field is {said!r}" in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_not_finite(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], number: str
) -> None:
    text = json.dumps(chat(steering=joy)).replace("2.0", number)
    headers = {"content-type": "application/json"}
    error = refusal(await http.post(URL, content=text, headers=headers), 400)
    assert error["param"] == AT + "/strength"
    text = json.dumps(chat()).replace('"temperature": 0', f'"temperature": {number}')
    error = refusal(await http.post(URL, content=text, headers=headers), 400)
    assert error["param"] == "/temperature"


@pytest.mark.parametrize(
    ("tensor", "code"),
    [
        (full((16,), float("nan")), "not_finite"),
        (full((16,), float("inf")), "not_finite"),
        (zeros(16), "zero_vector"),
        (ones(17), "wrong_width"),
    ],
)
async def test_inline_vectors_that_cannot_steer(
    http: httpx.AsyncClient, chat: Body, tensor: Any, code: str
) -> None:
    spec = {"interventions": [{"kind": "add", "vector": inline(tensor)}]}
    error = refusal(await http.post(URL, json=chat(steering=spec)), 400)
    assert error["code"] == code
    assert error["param"].startswith(AT + "/vector")


@pytest.mark.parametrize("data", ["", "???", base64.b64encode(b"no vector").decode()])
async def test_inline_vectors_that_are_no_vectors(
    http: httpx.AsyncClient, chat: Body, data: str
) -> None:
    spec = {"interventions": [{"kind": "add", "vector": {"layer": 2, "data": data}}]}
    error = refusal(await http.post(URL, json=chat(steering=spec)), 400)
    assert error["param"].startswith(AT + "/vector")


async def test_inline_vectors_can_be_forbidden(
    engine: FakeEngine,
    registry: Registry,
    chat: Body,
    in_process: Callable[[FastAPI], httpx.AsyncClient],
) -> None:
    spec = {"interventions": [{"kind": "add", "vector": inline(ones(16))}]}
    for allowed in (True, False):
        strict = create_app(engine, registry, ServerSettings(allow_inline_vectors=allowed))
        async with in_process(strict) as client:
            response = await client.post(URL, json=chat(steering=spec))
            validation = await client.post("/v1/steering/validate", json={"steering": spec})
        assert validation.json()["valid"] is allowed
        assert response.is_success is allowed
    assert refusal(response, 400)["code"] == "inline_vectors_disabled"


async def test_ten_thousand_interventions(http: httpx.AsyncClient, chat: Body) -> None:
    item = {"kind": "add", "vector": "joy"}
    spec = {"interventions": [item] * 10_000}
    error = refusal(await http.post(URL, json=chat(steering=spec)), 400)
    assert error["param"] == "/steering/interventions"
    assert "64" in error["message"]


@pytest.mark.parametrize(
    "steering", [[], "joy", 3, {}, {"interventions": []}, {"interventions": {}}]
)
async def test_things_that_are_no_spec(http: httpx.AsyncClient, chat: Body, steering: Any) -> None:
    error = refusal(await http.post(URL, json=chat(steering=steering)), 400)
    assert error["param"].startswith("/steering")


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "/tools"),
    ({"tool_choice": "required"}, "/tool_choice"),
    ({"response_format": {"type": "json_object"}}, "/response_format"),
    ({"response_format": {"type": "unknown"}}, "/response_format"),
    ({"response_format": {"type": "json_schema"}}, "/response_format/json_schema"),
    ({"frequency_penalty": 2.5}, "/frequency_penalty"),
    ({"presence_penalty": "much"}, "/presence_penalty"),
    ({"repetition_penalty": 0}, "/repetition_penalty"),
    ({"repetition_penalty": 1e300}, "/repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "/logit_bias"),
    ({"logit_bias": {"5": 101}}, "/logit_bias"),
    ({"logit_bias": {"999999": 1}}, "/logit_bias"),
    ({"logit_bias": [5]}, "/logit_bias/0"),
    ({"min_p": 1.5}, "/min_p"),
    ({"min_tokens": 9, "max_tokens": 8}, "/min_tokens"),
    ({"min_tokens": -1}, "/min_tokens"),
    ({"stop_token_ids": [-1]}, "/stop_token_ids/0"),
    ({"stop_token_ids": [999_999]}, "/stop_token_ids"),
    ({"prompt_logprobs": 3}, "/prompt_logprobs"),
    ({"use_beam_search": True}, "/use_beam_search"),
    ({"length_penalty": 2}, "/length_penalty"),
    ({"bad_words": ["x"]}, "/bad_words"),
    ({"truncate_prompt_tokens": 5}, "/truncate_prompt_tokens"),
    ({"extra_body": {"top_k": 3}}, "/extra_body"),
    ({"echo": True}, "/echo"),
    ({"modalities": ["audio"]}, "/modalities"),
    ({"reasoning_effort": "high"}, "/reasoning_effort"),
    ({"max_token": 5}, "/max_token"),
    ({"max_tokens": 0}, "/max_tokens"),
    ({"max_tokens": "5"}, "/max_tokens"),
    ({"max_tokens": 2.5}, "/max_tokens"),
    ({"temperature": -0.1}, "/temperature"),
    ({"temperature": 2.1}, "/temperature"),
    ({"temperature": "hot"}, "/temperature"),
    ({"top_p": 0}, "/top_p"),
    ({"top_k": -2}, "/top_k"),
    ({"top_k": True}, "/top_k"),
    ({"seed": 1.5}, "/seed"),
    ({"seed": 2**70}, "/seed"),
    ({"n": 0}, "/n"),
    ({"n": 33}, "/n"),
    ({"n": 10**12}, "/n"),
    ({"stop": ["a"] * 33}, "/stop"),
    ({"stop": [""]}, "/stop/0"),
    ({"stop": 5}, "/stop"),
    ({"stop": "x" * 300}, "/stop"),
    ({"logprobs": True, "top_logprobs": 21}, "/top_logprobs"),
    ({"stream": "maybe"}, "/stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "/stream_options/x"),
    ({"receipt": "long"}, "/receipt"),
    ({"compare": True}, "/compare"),
    ({"messages": []}, "/messages"),
    ({"messages": "hello"}, "/messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "/messages/0/role"),
    ({"messages": [{"role": "user"}]}, "/messages/0/content"),
    ({"messages": [{"role": "user", "content": None}]}, "/messages/0/content"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "/messages/0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "/messages/0/content"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        "/messages",
    ),
    ({"inspect": {"kind": "other"}}, "/inspect/kind"),
    ({"inspect": {"layers": [50]}}, "/inspect/layers/0"),
    ({"inspect": {"positions": [900]}}, "/inspect/positions/0"),
    ({"model": ""}, "/model"),
    ({"model": 5}, "/model"),
]


@pytest.mark.parametrize(("fields", "param"), FIELDS)
async def test_fields_that_cannot_be_honoured_are_refused_by_name(
    http: httpx.AsyncClient, chat: Body, fields: dict[str, Any], param: str
) -> None:
    assert refusal(await http.post(URL, json=chat(**fields)))["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 2},
        {"max_tokens": 5, "max_completion_tokens": 6},
        {"stream_options": {"include_usage": True}},
    ],
)
async def test_fields_that_contradict_each_other(
    http: httpx.AsyncClient, chat: Body, fields: dict[str, Any]
) -> None:
    message = refusal(await http.post(URL, json=chat(**fields)), 400)["message"]
    assert all(name in message for name in fields)


async def test_streams_are_refused_before_they_begin(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    wrong = {"interventions": [{"kind": "add", "vector": "missing"}]}
    refusal(await http.post(URL, json=chat(stream=True, steering=wrong)), 400)
    body = chat(stream=True, steering=joy, inspect={"layers": [0]})
    assert refusal(await http.post(URL, json=body), 400)["param"] == "/inspect"
    refused = refusal(await http.post(URL, json=chat(stream=True, compare=True)), 400)
    assert (refused["code"], refused["param"]) == ("nothing_to_compare", "/compare")


@pytest.mark.parametrize(
    "model", ["other", "fake-model:", "fake-model:none", "a:b", "fake-model:a/b"]
)
async def test_unknown_models(http: httpx.AsyncClient, chat: Body, model: str) -> None:
    error = refusal(await http.post(URL, json=chat(model=model)), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "/model")
    assert refusal(await http.get(f"/v1/models/{model}"), 404)["code"] == "model_not_found"


async def test_prompts_beyond_the_context(http: httpx.AsyncClient, chat: Body) -> None:
    body = chat(messages=[{"role": "user", "content": "x" * 600}])
    error = refusal(await http.post(URL, json=body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "/messages")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"model": "fake-model"}', b"[" * 100_000],
)
async def test_bodies_that_are_no_request(http: httpx.AsyncClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refusal(await http.post(URL, content=content, headers=headers), 400)


async def test_numbers_of_thousands_of_digits(http: httpx.AsyncClient, chat: Body) -> None:
    text = json.dumps(chat()).replace('"temperature": 0', '"seed": ' + "9" * 6000)
    headers = {"content-type": "application/json"}
    refusal(await http.post(URL, content=text, headers=headers), 400)


async def test_text_that_is_not_unicode(http: httpx.AsyncClient, chat: Body) -> None:
    broken = "\ud800"
    for body in (
        chat(messages=[{"role": "user", "content": broken}]),
        chat(**{broken: 1}),
        chat(model=broken),
        chat(stop=broken),
        chat(steering={"interventions": [{"kind": "add", "vector": broken}]}),
        chat(steering={broken: 1}),
    ):
        headers = {"content-type": "application/json"}
        refusal(await http.post(URL, content=json.dumps(body), headers=headers))


@pytest.mark.parametrize("depth", [50, 400])
async def test_deep_nesting(http: httpx.AsyncClient, chat: Body, depth: int) -> None:
    where: dict[str, Any] = {"phases": ["prompt"]}
    for _ in range(depth):
        where = {"except": where}
    spec = {"interventions": [{"kind": "add", "vector": "joy"}], "where": where}
    refusal(await http.post(URL, json=chat(steering=spec)), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", None])
@pytest.mark.parametrize("route", [URL, "/v1/steering/profiles", "/v1/steering/validate"])
async def test_wrong_content_types(
    http: httpx.AsyncClient, chat: Body, kind: str | None, route: str
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    error = refusal(
        await http.post(route, content=json.dumps(chat()).encode(), headers=headers), 415
    )
    assert "application/json" in error["message"]


async def test_huge_bodies_are_refused_by_their_length(http: httpx.AsyncClient, chat: Body) -> None:
    body = chat(messages=[{"role": "user", "content": "x" * 500_000}])
    assert refusal(await http.post(URL, json=body), 413)["code"] == "request_too_large"


async def test_huge_bodies_without_a_length_are_not_read_to_the_end(
    http: httpx.AsyncClient,
) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 10_000
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    error = refusal(await http.post(URL, content=endless(), headers=headers), 413)
    assert error["code"] == "request_too_large"
    assert read < 1_000_000


async def test_routes_that_do_not_exist(http: httpx.AsyncClient) -> None:
    assert refusal(await http.get("/v1/embeddings"), 404)["code"] == "not_found"
    assert refusal(await http.get(URL), 405)["code"] == "method_not_allowed"
    assert refusal(await http.delete("/v1/models"), 405)["code"] == "method_not_allowed"
    assert refusal(await http.get("/v1/steering/vectors/a%2Fb"), 404)["code"] == "not_found"


async def test_failures_say_nothing_about_the_inside(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    engine.failure = FakeFailure(error=RuntimeError("secret /path"))
    response = await http.post(URL, json=chat())
    engine.failure = None
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text


async def test_a_full_engine_asks_to_come_back(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    engine.failure = FakeFailure(error=CapacityError("no slot is free"))
    response = await http.post(URL, json=chat())
    engine.failure = None
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "at_capacity"


async def test_the_api_key_guards_everything_below_v1(
    engine: FakeEngine,
    registry: Registry,
    chat: Body,
    in_process: Callable[[FastAPI], httpx.AsyncClient],
) -> None:
    guarded = create_app(engine, registry, ServerSettings(api_key="s3cret"))  # type: ignore[arg-type]
    async with in_process(guarded) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            response = await client.post(URL, json=chat(), headers=headers)
            assert refusal(response, 401)["code"] == "invalid_api_key"
        right = {"authorization": "Bearer s3cret"}
        assert (await client.post(URL, json=chat(), headers=right)).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_json_answers_are_refused_by_name_where_the_engine_has_none(
    http: httpx.AsyncClient, chat: Body
) -> None:
    named = {"name": "n", "schema": {"type": "object"}, "strict": True}
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": named}):
        error = refusal(await http.post(URL, json=chat(response_format=form)), 400)
        assert error["param"] == "/response_format"
        assert error["code"] == "unsupported_parameter"
    body = {"model": "fake-model", "input": "Hi", "text": {"format": {"type": "json_object"}}}
    assert refusal(await http.post("/v1/responses", json=body), 400)["param"] == "/text/format"


@pytest.mark.parametrize(
    ("url", "body", "param", "message"),
    [
        (
            URL,
            {"inspect": {"norms": "every"}},
            "/inspect/norms",
            "norms: a list is needed, or 'all'; got 'every'",
        ),
        (URL, {"inspect": {"lens": True}}, "/inspect/lens", "lens: an object is needed, {"),
        (
            URL,
            {"inspect": {"projections": ["joy"]}},
            "/inspect/projections/0",
            "projections[0]: an object is needed, {",
        ),
        (
            URL,
            {"inspect": {"norms": [-1]}},
            "/inspect/norms/0",
            "layer -1 is counted from the model's end: layers are numbered from 0",
        ),
        (
            URL,
            {"steering": {"interventions": {"kind": "add"}}},
            "/steering/interventions",
            "a list is needed; got {'kind': 'add'}",
        ),
        (
            URL,
            {"steering": {"interventions": []}},
            "/steering/interventions",
            "a list of at least 1 is needed; got []",
        ),
        (
            "/v1/inspect/activations",
            {"text": "a", "layers": "0-3"},
            "/layers",
            "layers: a list is needed, or 'all'; got '0-3'",
        ),
        (
            "/v1/inspect/activations",
            {"text": "a", "positions": "a", "layers": [1]},
            "/positions",
            "positions: the only word here is 'all'; got 'a'",
        ),
    ],
)
async def test_wrong_forms_are_told_in_json_words(
    http: httpx.AsyncClient, chat: Body, url: str, body: dict[str, Any], param: str, message: str
) -> None:
    sent = chat(**body) if url == URL else body
    error = refusal(await http.post(url, json=sent), 400)
    assert error["param"] == param
    assert error["message"].startswith(message)
