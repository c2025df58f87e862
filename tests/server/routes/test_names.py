"""Aliases, tags, pins, deletion that can be undone, and search, over HTTP."""

from __future__ import annotations

import httpx
import pytest
from safetensors.torch import save
from torch import ones

VECTORS = "/v1/steering/vectors"
ALIASES = "/v1/steering/aliases"


async def test_an_alias_steers_and_moves(http: httpx.AsyncClient, chat) -> None:
    answer = await http.put(f"{ALIASES}/vectors/mood", json={"target": "joy"})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "object": "steering.alias",
        "artefacts": "vectors",
        "name": "mood",
        "target": "joy",
    }

    async def fingerprint(name: str) -> str:
        spec = {"interventions": [{"kind": "add", "vector": name}]}
        reply = await http.post("/v1/chat/completions", json=chat(steering=spec, max_tokens=4))
        assert reply.status_code == 200, reply.text
        return reply.json()["steering"]["fingerprint"]

    assert (await http.get(f"{VECTORS}/mood")).json()["name"] == "joy"
    assert (await http.get(f"{VECTORS}/joy")).json()["aliases"] == ["mood"]
    joyful, calm = await fingerprint("joy"), await fingerprint("calm")
    assert await fingerprint("mood") == joyful
    refused = await http.delete(f"{VECTORS}/joy")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    await http.put(f"{ALIASES}/vectors/mood", json={"target": "calm"})
    assert await fingerprint("mood") == calm
    listed = (await http.get(ALIASES, params={"artefacts": "vectors"})).json()["data"]
    assert [(one["name"], one["target"]) for one in listed] == [("mood", "calm")]
    assert (await http.get(ALIASES, params={"artefacts": "saes"})).json()["data"] == []
    assert (await http.delete(f"{ALIASES}/vectors/mood")).json() == {
        "name": "mood",
        "deleted": True,
    }
    gone = await http.delete(f"{ALIASES}/vectors/mood")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_alias")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("vectors/calm", {"target": "joy"}, 409, "name_taken"),
        ("vectors/new", {"target": "nowhere"}, 400, "unknown_vector"),
        ("vectors/a b", {"target": "joy"}, 400, "invalid_name"),
        ("vectors/new", {"target": "joy", "more": 1}, 400, None),
        ("vectors/new", {}, 400, None),
        ("profiles/new", {"target": "joy"}, 400, None),
    ],
)
async def test_aliases_that_cannot_be(
    http: httpx.AsyncClient, path: str, body: dict, status: int, code: str | None
) -> None:
    answer = await http.put(f"{ALIASES}/{path}", json=body)
    assert answer.status_code == status, answer.text
    if code is not None:
        assert answer.json()["error"]["code"] == code


async def test_tags_come_and_go_and_find(http: httpx.AsyncClient) -> None:
    await http.put(f"{VECTORS}/joy/tags/mood")
    answer = await http.put(f"{VECTORS}/joy/tags/beta")
    assert answer.json() == {"name": "joy", "tags": ["beta", "mood"]}
    assert (await http.get(f"{VECTORS}/joy")).json()["tags"] == ["beta", "mood"]

    async def found(**params: object) -> list[str]:
        answer = await http.get(VECTORS, params=params)
        assert answer.status_code == 200, answer.text
        return [one["name"] for one in answer.json()["data"]]

    assert await found(tag="mood") == ["joy"]
    assert await found(q="MOO") == ["joy"]
    assert await found(width=17) == ["wide"]
    assert await found(model="none") == []
    assert (await http.delete(f"{VECTORS}/joy/tags/mood")).json()["tags"] == ["beta"]
    bad = await http.put(f"{VECTORS}/joy/tags/a b")
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_tag")
    unknown = await http.put(f"{VECTORS}/nowhere/tags/x")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_vector")


async def test_what_was_deleted_is_listed_and_restored(http: httpx.AsyncClient) -> None:
    shown = (await http.get(f"{VECTORS}/joy")).json()
    assert "removed_at" not in shown
    await http.delete(f"{VECTORS}/joy")
    assert (await http.get(f"{VECTORS}/joy")).status_code == 404
    (gone,) = (await http.get(VECTORS, params={"deleted": "true"})).json()["data"]
    assert (gone["id"], "removed_at" in gone) == (shown["id"], True)
    back = await http.post(f"{VECTORS}/joy/restore")
    assert (back.status_code, back.json()["id"]) == (200, shown["id"])
    assert (await http.get(f"{VECTORS}/joy")).json() == shown
    again = await http.post(f"{VECTORS}/joy/restore")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "unknown_vector")


async def test_a_pinned_profile_keeps_its_meaning(http: httpx.AsyncClient, chat) -> None:
    spec = {"interventions": [{"kind": "add", "vector": "joy"}]}
    first = (await http.get(f"{VECTORS}/joy")).json()
    for name, pin in (("free", False), ("held", True)):
        body = {"name": name, "spec": spec, "pin": pin}
        saved = (await http.post("/v1/steering/profiles", json=body)).json()
        assert saved["spec"]["interventions"][0]["vector"] == (first["id"] if pin else "joy")

    async def fingerprints() -> list[str]:
        models = [f"fake-model:{name}" for name in ("free", "held")]
        replies = [
            await http.post("/v1/chat/completions", json=chat(model=model, max_tokens=4))
            for model in models
        ]
        return [reply.json()["steering"]["fingerprint"] for reply in replies]

    before = await fingerprints()
    await http.post(
        VECTORS,
        files={"file": ("joy.safetensors", save({"layers.2": ones(16), "layers.3": ones(16)}))},
    )
    after = await fingerprints()
    assert after[0] != before[0]
    assert after[1] == before[1]
