"""Two servers of different models on one registry: each has its own meaning of every name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from steer.artefacts.control_vector import ControlVector
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.registry.profiles import Profile
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

WIDTHS = {"small": 16, "large": 24}
ADD = {"kind": "add", "vector": "formal"}
SPEC = {"interventions": [ADD]}


def a_vector(model: str | None, value: float = 1.0, width: int | None = None) -> ControlVector:
    row = torch.full((width or WIDTHS[str(model)],), value)
    return ControlVector.of({2: row}, model=model)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
async def servers(
    registry: Registry,
    settings: ServerSettings,
    in_process: Callable[[FastAPI], httpx.AsyncClient],
) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """A client of the server of each model, by its name."""
    async with AsyncExitStack() as stack:
        clients = {}
        for name, width in WIDTHS.items():
            engine = FakeEngine(fake_model(name=name, d_model=width))
            app = create_app(engine, registry, settings)
            clients[name] = await stack.enter_async_context(in_process(app))
        yield clients


async def uploaded(client: httpx.AsyncClient, vector: ControlVector, name: str = "formal") -> Any:
    answer = await client.post(
        "/v1/steering/vectors",
        files={"file": ("v.safetensors", vector.to_bytes())},
        data={"name": name},
    )
    assert answer.is_success, answer.text
    return answer.json()


async def chat(client: httpx.AsyncClient, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    return await client.post("/v1/chat/completions", json={**body, **fields})


async def names(client: httpx.AsyncClient, path: str, **query: str) -> list[str]:
    rows = (await client.get(path, params=query)).json()["data"]
    return [row.get("name") or row["id"] for row in rows]


@pytest.mark.parametrize("said", [True, False], ids=["card-with-model", "card-without"])
async def test_each_server_steers_with_its_own_vector_of_a_name(
    servers: dict[str, httpx.AsyncClient], said: bool
) -> None:
    for model, width in WIDTHS.items():
        await uploaded(servers[model], a_vector(model if said else None, width=width))
    fingerprints = set()
    for model, client in servers.items():
        answer = await chat(client, model, steering=SPEC)
        assert answer.status_code == 200, answer.text
        fingerprints.add(answer.json()["steering"]["fingerprint"])
        shown = (await client.get("/v1/steering/vectors/formal")).json()
        assert shown["d_model"] == WIDTHS[model]
        assert len(shown["versions"]) == 2
    assert len(fingerprints) == 2


async def test_a_plan_is_compiled_anew_for_a_new_version_of_this_model_alone(
    servers: dict[str, httpx.AsyncClient],
) -> None:
    for model in WIDTHS:
        await uploaded(servers[model], a_vector(model))

    async def fingerprint() -> str:
        found: str = (await chat(servers["small"], "small", steering=SPEC)).json()["steering"][
            "fingerprint"
        ]
        return found

    before = await fingerprint()
    await uploaded(servers["large"], a_vector("large", 2.0))
    assert await fingerprint() == before
    await uploaded(servers["small"], a_vector("small", 2.0))
    assert await fingerprint() != before


async def test_content_that_the_other_model_has_newer_is_not_new_here(
    servers: dict[str, httpx.AsyncClient],
) -> None:
    first = await uploaded(servers["small"], a_vector("small"))
    await uploaded(servers["large"], a_vector("large"))
    assert await uploaded(servers["small"], a_vector("small")) == first


async def test_a_name_that_only_another_model_has_is_refused_for_what_it_is(
    servers: dict[str, httpx.AsyncClient],
) -> None:
    await uploaded(servers["small"], a_vector("small"))
    answer = await chat(servers["large"], "large", steering=SPEC)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "wrong_width"
    assert await names(servers["large"], "/v1/steering/vectors") == []
    assert await names(servers["large"], "/v1/steering/vectors", model="small") == ["formal"]
    assert await names(servers["large"], "/v1/steering/vectors", model="*") == ["formal"]
    gone = await servers["large"].delete("/v1/steering/vectors/formal")
    assert gone.status_code == 404
    assert "no version for 'large'" in gone.json()["error"]["message"]
    assert (await chat(servers["small"], "small", steering=SPEC)).status_code == 200


async def test_profiles_of_one_name_steer_each_model_by_its_own(
    servers: dict[str, httpx.AsyncClient],
) -> None:
    for model, client in servers.items():
        await uploaded(client, a_vector(model))
        saved = await client.post(
            "/v1/steering/profiles",
            json={"name": "polite", "spec": SPEC, "description": f"of {model}"},
        )
        assert saved.json()["for_model"] == model
    await uploaded(servers["small"], a_vector("small"), "only")
    only = {"interventions": [{"kind": "add", "vector": "only"}]}
    await servers["small"].post("/v1/steering/profiles", json={"name": "only", "spec": only})
    for model, client in servers.items():
        answer = await chat(client, f"{model}:polite")
        assert answer.status_code == 200, answer.text
        shown = (await client.get("/v1/steering/profiles/polite")).json()
        assert (shown["model"], shown["description"]) == (f"{model}:polite", f"of {model}")
    assert await names(servers["small"], "/v1/steering/profiles") == ["only", "polite"]
    assert await names(servers["large"], "/v1/steering/profiles") == ["polite"]
    every = (await servers["large"].get("/v1/steering/profiles", params={"model": "*"})).json()
    assert [row["model"] for row in every["data"]] == ["small:only", "large:polite", "small:polite"]
    # What another model's needs does not hold up this one.
    assert (await servers["large"].delete("/v1/steering/profiles/polite")).status_code == 200
    assert (await servers["large"].delete("/v1/steering/vectors/formal")).status_code == 200
    refused = await servers["small"].delete("/v1/steering/vectors/formal")
    assert refused.json()["error"]["code"] == "in_use"
    assert (await chat(servers["small"], "small:polite")).status_code == 200


async def test_the_list_of_models_has_no_profile_that_must_be_refused(
    servers: dict[str, httpx.AsyncClient], registry: Registry
) -> None:
    """Also of those saved without a model, as all were in older registries."""
    registry.add("formal", a_vector("small"))
    registry.put_profile(Profile(name="old", spec=SPEC))
    assert await names(servers["small"], "/v1/models") == ["small", "small:old"]
    assert await names(servers["large"], "/v1/models") == ["large"]
    assert (await servers["small"].get("/v1/models/small:old")).status_code == 200
    for model in ("large:old", "large:none"):
        missing = await servers["large"].get(f"/v1/models/{model}")
        assert missing.json()["error"]["code"] == "model_not_found"
    refused = await chat(servers["large"], "large:old")
    assert refused.json()["error"]["code"] == "wrong_width"
