"""Every kind of artefact has every route: uploaded, listed, shown, named, tagged, removed."""

from __future__ import annotations

import hashlib
import io

import httpx
import pytest
from artefacts import EXAMPLES
from fastapi import FastAPI
from rich.console import Console

from steer.artefacts.kinds import KINDS, KindRow
from steer.registry.registry import Registry
from steer_server.banner import banner
from steer_server.openapi import openapi_document

ALIASES = "/v1/steering/aliases"

each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)


async def answered(http: httpx.AsyncClient, method: str, path: str, **request: object) -> dict:
    answer = await http.request(method, path, **request)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


@each_kind
async def test_a_life_over_http(http: httpx.AsyncClient, row: KindRow) -> None:
    place, data = f"/v1/steering/{row.plural}", EXAMPLES[row.name]().to_bytes()
    added = await answered(http, "POST", place, files={"file": ("one.safetensors", data)})
    assert (added["object"], added["name"]) == (f"steering.{row.name}", "one")
    assert added["sha256"] == hashlib.sha256(data).hexdigest()

    alias = await answered(http, "PUT", f"{ALIASES}/{row.plural}/other", json={"target": "one"})
    assert alias["artefacts"] == row.plural
    tagged = await answered(http, "PUT", f"{place}/other/tags/fine")
    assert tagged["tags"] == ["fine"]
    shown = await answered(http, "GET", f"{place}/other")
    assert (shown["id"], shown["aliases"], shown["tags"]) == (added["id"], ["other"], ["fine"])
    listed = await answered(http, "GET", place, params={"tag": "fine"})
    assert [one["id"] for one in listed["data"]] == [added["id"]]
    content = await http.get(f"{place}/other/content")
    assert content.content == data
    other_form = await http.get(f"{place}/one/content", params={"format": "gguf"})
    assert (other_form.status_code == 200) is row.exported, other_form.text

    refused = await http.delete(f"{place}/one")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    await answered(http, "DELETE", f"{ALIASES}/{row.plural}/other")
    await answered(http, "DELETE", f"{place}/one/tags/fine")
    await answered(http, "DELETE", f"{place}/one")
    gone = await http.get(f"{place}/one")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, f"unknown_{row.name}")
    back = await answered(http, "POST", f"{place}/one/restore")
    assert (back["id"], back["tags"]) == (added["id"], [])


async def test_aliases_of_every_kind_are_listed(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    """Set from Python, as they may be for any kind."""
    for row in KINDS:
        registry.add("one", EXAMPLES[row.name]())
        registry.set_alias(row.name, "other", "one")
    listed = (await answered(http, "GET", ALIASES))["data"]
    assert {one["artefacts"] for one in listed} == {row.plural for row in KINDS}
    for row in KINDS:
        found = await answered(http, "GET", ALIASES, params={"artefacts": row.plural})
        assert found["data"] == [one for one in listed if one["artefacts"] == row.plural]


def test_the_banner_lists_every_kind(app: FastAPI, registry: Registry) -> None:
    for row in KINDS:
        registry.add(f"a-{row.name}", EXAMPLES[row.name]())
    out = io.StringIO()
    Console(file=out, width=300).print(banner(app.state.steer, "http://127.0.0.1:8000"))
    for row in KINDS:
        (line,) = [line for line in out.getvalue().splitlines() if f" {row.title} " in line]
        assert f"a-{row.name}" in line


def test_the_document_names_every_kind() -> None:
    document = openapi_document()
    plurals, names = {row.plural for row in KINDS}, {row.name for row in KINDS}
    schemas = document["components"]["schemas"]
    assert set(schemas["AliasBody"]["properties"]["artefacts"]["enum"]) == plurals
    assert set(schemas["Card"]["properties"]["kind"]["enum"]) == names
    bodies = document["paths"]["/v1/steering/import"]["post"]["requestBody"]["content"]
    for body in bodies.values():
        assert set(body["schema"]["properties"]["artefact"]["enum"]) == names
    ours = [path.split("/")[3] for path in document["paths"] if path.endswith("/restore")]
    assert set(ours) == plurals
