"""Inspection over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from steer.engines.base import Engine
from steer.inspection import (
    Inspection,
    LogitLensRequest,
    LogitLensResult,
    lens_heat_map,
    logit_lens,
)
from steer.inspection.method import reads_states
from steer_server.routes.inspect_routes import make_router


async def test_a_logit_is_taken_apart(http: httpx.AsyncClient) -> None:
    body = {"text": "Paris", "token": "a", "against": "b"}
    response = await http.post("/v1/inspect/attribution", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    layers = found["layers"]
    parts = sum(one["attention"] + one["mlp"] + one["rest"] for one in layers)
    told = found["constant"] + found["embedding"] + parts + found["unexplained"]
    assert abs(told - found["logit"]) < 1e-6
    assert len(layers) == 6
    picture = await http.post("/v1/inspect/attribution?format=png", json=body)
    assert picture.content.startswith(b"\x89PNG")
    same = await http.post("/v1/inspect/attribution", json={**body, "against": "a"})
    assert (same.status_code, same.json()["error"]["code"]) == (400, "same_token")
    # The fake engine's states are no sums, so that heads have no share in them.
    heads = await http.post("/v1/inspect/attribution", json={**body, "heads": True})
    assert (heads.status_code, heads.json()["error"]["param"]) == (400, "/heads")


async def test_a_flow_is_refused_where_no_attention_is_told(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/inspect/flow", json={"text": "Paris"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_inspection")
    assert "does not tell what the heads of this model attend to" in error["message"]


async def test_states_are_clustered(http: httpx.AsyncClient) -> None:
    prompts = [{"text": text, "label": text[:1]} for text in ("ab", "ac", "xy", "xz")]
    body = {"prompts": prompts, "layer": 2, "clusters": 2, "exemplars": 1}
    response = await http.post("/v1/inspect/clusters", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert sum(one["size"] for one in found["clusters"]) == len(found["states"]) == 4
    assert {"purity", "purity_by_chance", "silhouette"} <= found.keys()
    picture = await http.post("/v1/inspect/clusters?format=png", json=body)
    assert picture.content.startswith(b"\x89PNG")
    many = await http.post("/v1/inspect/clusters", json={**body, "clusters": 5})
    assert (many.status_code, many.json()["error"]["code"]) == (400, "too_few_states")


async def test_concepts_are_read(http: httpx.AsyncClient) -> None:
    said = [{"text": f"{n}", "pairs": {"parity": "even" if n % 2 else "odd"}} for n in range(20)]
    body = {"examples": said, "prompts": [{"text": "3"}], "dimensions": 256, "layers": [2]}
    response = await http.post("/v1/inspect/concepts", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert (found["trained"], found["held_out"], found["fillers"]) == (16, 4, 2)
    assert {"accuracy", "shuffled", "commonest"} <= found["roles"][0].keys()
    assert len(found["readings"]) == 1
    picture = await http.post("/v1/inspect/concepts?format=png", json=body)
    assert picture.content.startswith(b"\x89PNG")
    alike = {**body, "examples": [{**one, "pairs": {"a": "b"}} for one in said]}
    same = await http.post("/v1/inspect/concepts", json=alike)
    assert (same.status_code, same.json()["error"]["code"]) == (400, "one_filler")


async def test_a_subject_is_traced(http: httpx.AsyncClient) -> None:
    body = {"text": "In Paris", "subject": "Par", "layers": [1, 4], "draws": 2}
    response = await http.post("/v1/inspect/trace", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["corrupted"]["positions"] == [4, 5, 6]
    places = [(cell["layer"], cell["position"]) for cell in found["cells"]]
    assert places == [(layer, place) for layer in (1, 4) for place in range(4, 9)]
    picture = await http.post("/v1/inspect/trace?format=png", json=body)
    assert picture.content.startswith(b"\x89PNG")


async def test_states_are_matched_with_the_vectors_that_are_registered(
    http: httpx.AsyncClient,
) -> None:
    body = {"text": "Paris", "layers": [2], "positions": [0, -1], "draws": 200}
    response = await http.post("/v1/inspect/match", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert "joy" in found["vectors"]
    assert {one["position"] for one in found["matches"]} == {0, 5}
    picture = await http.post("/v1/inspect/match?format=png", json=body)
    assert picture.content.startswith(b"\x89PNG")
    wrong = await http.post("/v1/inspect/match", json={**body, "vectors": ["joy", "nobody"]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "/vectors/1")


async def test_prompts_are_points_in_a_plane(http: httpx.AsyncClient) -> None:
    prompts = [{"text": "Paris"}, {"messages": [{"role": "user", "content": "Rome"}]}]
    body = {"prompts": prompts, "vectors": ["joy"], "layer": 2}
    response = await http.post("/v1/inspect/coordinates", json=body)
    assert response.status_code == 200, response.text
    assert len(response.json()["points"]) == 2
    picture = await http.post("/v1/inspect/coordinates?format=png", json=body)
    assert picture.content.startswith(b"\x89PNG")
    twice = await http.post("/v1/inspect/coordinates", json={**body, "vectors": ["joy", "joy"]})
    assert (twice.status_code, twice.json()["error"]["code"]) == (400, "dependent_vectors")


async def test_weights_are_read_as_tokens(http: httpx.AsyncClient) -> None:
    body = {"layer": 2, "neuron": 3, "top": 4}
    response = await http.post("/v1/inspect/weights", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert [(one["what"], len(one["most"])) for one in found["readings"]] == [
        ("reads", 4),
        ("writes", 4),
    ]
    picture = await http.post("/v1/inspect/weights?format=png", json=body)
    assert picture.content.startswith(b"\x89PNG")
    table = (await http.post("/v1/inspect/weights", json={"layer": 2})).json()
    assert [one["head"] for one in table["heads"]] == [0, 1, 2, 3]
    wrong = await http.post("/v1/inspect/weights", json={"layer": 2, "head": 4})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "/head")
    unclear = await http.post("/v1/inspect/weights", json={"neuron": 4})
    assert (unclear.status_code, "give 'layer' too" in unclear.text) == (400, True)


async def test_a_patchscope_sweeps_layers(http: httpx.AsyncClient) -> None:
    body = {"source": {"text": "Paris"}, "layers": [1, 3], "max_tokens": 4}
    response = await http.post("/v1/inspect/patchscope", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert [(cell["layer"], cell["target_layer"]) for cell in found["cells"]] == [(1, 1), (3, 3)]
    assert found["cells"][0]["text"] != found["baseline"]["text"]
    assert {cell["shuffled"]["position"] for cell in found["cells"]} <= set(range(1, 5))
    assert [one["position"] for one in found["text_only"]] == [5]
    body["controls"] = ["text"]
    bare = (await http.post("/v1/inspect/patchscope", json=body)).json()
    assert "text_only" in bare
    assert all("shuffled" not in cell for cell in bare["cells"])


async def test_the_logit_lens_reads_the_steered_model(
    http: httpx.AsyncClient, joy: dict[str, Any]
) -> None:
    body = {"text": "Paris", "positions": [-1], "top": 2}
    plain = (await http.post("/v1/inspect/logit-lens", json=body)).json()
    steered = (await http.post("/v1/inspect/logit-lens", json={**body, "steering": joy})).json()
    assert plain["layers"] == list(range(6))
    assert plain["cells"][1] == steered["cells"][1]
    assert plain["cells"][4] != steered["cells"][4]
    assert steered["fingerprint"]


async def test_activations_are_read_on_vectors_and_features(http: httpx.AsyncClient) -> None:
    body = {"text": "Paris", "positions": [-1], "vectors": ["joy"], "sae": "features"}
    response = await http.post("/v1/inspect/activations", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert [(row["vector"], row["layer"]) for row in found["vectors"]] == [("joy", 2), ("joy", 3)]
    assert found["features"]["sae"] == "features"
    assert found["features"]["d_sae"] == 8


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("patchscope", {"source": {"text": "x"}, "layers": [50]}, "/layers/0"),
        ("patchscope", {"source": {}}, "/source"),
        ("patchscope", {}, "/source"),
        ("patchscope", {"source": {"text": "x"}, "controls": ["luck"]}, "/controls/0"),
        ("logit-lens", {"text": "x", "positions": [90]}, "/positions/0"),
        ("logit-lens", {"text": "x", "colour": 1}, "/colour"),
        (
            "logit-lens",
            {"text": "x", "steering": {"interventions": [{"kind": "add", "vector": "gone"}]}},
            "/steering/interventions/0/vector",
        ),
        ("activations", {"text": "x", "vectors": ["gone"]}, "/vectors/0"),
    ],
)
async def test_what_cannot_be_read_is_refused(
    http: httpx.AsyncClient, route: str, body: dict[str, Any], param: str
) -> None:
    response = await http.post(f"/v1/inspect/{route}", json=body)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("patchscope", {"source": {"text": "Paris"}, "layers": [1, 3], "max_tokens": 0}),
        ("logit-lens", {"text": "Paris", "layers": [1, 3]}),
        ("activations", {"text": "Paris", "layers": [2, 3], "vectors": ["joy"]}),
    ],
)
async def test_answers_can_be_drawn(
    http: httpx.AsyncClient, route: str, body: dict[str, Any]
) -> None:
    response = await http.post(f"/v1/inspect/{route}?format=png", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    assert response.content.startswith(b"\x89PNG")


def _last_place(engine: Engine, request: LogitLensRequest, **known: Any) -> LogitLensResult:
    return logit_lens(engine, request.model_copy(update={"positions": (-1,)}), **known)


async def test_a_method_of_the_table_has_its_route(
    http: httpx.AsyncClient, app: FastAPI, joy: dict[str, Any]
) -> None:
    """Whatever its name: request, steering, pictures and document come from the method."""
    method = Inspection(
        name="last_place",
        summary="What each layer would say after the prompt.",
        request=LogitLensRequest,
        result=LogitLensResult,
        run=_last_place,
        draw=lens_heat_map,
        possible=reads_states,
    )
    app.include_router(make_router([method]))
    body = {"text": "Paris", "layers": [2, 4], "steering": joy}
    found = await http.post("/v1/inspect/last-place", json=body)
    assert found.status_code == 200, found.text
    assert [cell["layer"] for cell in found.json()["cells"]] == [2, 4]
    assert found.json()["fingerprint"]
    drawn = await http.post("/v1/inspect/last-place?format=png", json=body)
    assert drawn.content.startswith(b"\x89PNG")
    wrong = await http.post("/v1/inspect/last-place", json={"text": "x", "colour": 1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "/colour")
    described = app.openapi()["paths"]["/v1/inspect/last-place"]["post"]
    assert described["description"] == method.summary
