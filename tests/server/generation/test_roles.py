"""Whose words are steered: of a chat's messages, and of nothing else."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from steer.engines.fake.engine import FakeEngine

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the station?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "Where?"},
]
WORDS = {"system": 9, "user": 21 + 6, "assistant": 5, "tool": 0}
"""The fake engine's tokens are bytes."""


def steering(*roles: str, **where: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": "joy"}], "where": {"roles": roles, **where}}


async def chat(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "steer-fake", "messages": MESSAGES, "max_tokens": 5, **fields}
    return await http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("roles", [["system"], ["user"], ["assistant", "tool"], ["tool"]], ids=str)
async def test_what_messages_of_a_role_say_is_steered(
    http: httpx.AsyncClient, engine: FakeEngine, roles: list[str]
) -> None:
    answer = await chat(http, model=engine.info.name, steering=steering(*roles))
    assert answer.status_code == 200, answer.text
    generated = answer.json()["usage"]["completion_tokens"] - 1
    wanted = sum(WORDS[role] for role in roles) + ("assistant" in roles) * generated
    assert answer.json()["steering"]["tokens_steered"] == wanted


async def test_a_response_and_a_profile_say_it_too(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    asked = {"model": engine.info.name, "input": "Where?", "max_output_tokens": 3}
    answer = await http.post("/v1/responses", json={**asked, "steering": steering("user")})
    assert answer.json()["steering"]["tokens_steered"] == 6
    saved = await http.post(
        "/v1/steering/profiles", json={"name": "users", "spec": steering("user")}
    )
    assert saved.status_code == 200
    answer = await chat(http, model=f"{engine.info.name}:users")
    assert answer.json()["steering"]["tokens_steered"] == WORDS["user"]
    refused = await http.post(
        "/v1/completions", json={"model": f"{engine.info.name}:users", "prompt": "Where?"}
    )
    assert refused.json()["error"]["code"] == "no_messages"
    assert refused.json()["error"]["param"] == "/model"


async def test_a_text_has_no_roles(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for spec, at in (
        (steering("user"), "/steering/where/roles"),
        (
            {
                "interventions": [
                    {"kind": "add", "vector": "joy", "where": {"except": {"roles": ["user"]}}}
                ]
            },
            "/steering/interventions/0/where/except/roles",
        ),
    ):
        answer = await http.post(
            "/v1/completions",
            json={"model": engine.info.name, "prompt": "Where?", "steering": spec},
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "no_messages", at)


async def test_a_template_that_rewrites_words_is_refused_and_steers_nobody(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    written = engine.tokenizer.apply_chat_template

    def shouting(messages: Any, **options: Any) -> Any:
        return written(
            [{**turn, "content": f"{len(turn['content'])} {turn['content']}"} for turn in messages],
            **options,
        )

    engine.tokenizer.apply_chat_template = shouting
    answer = await chat(http, model=engine.info.name, steering=steering("user"))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "roles_unsupported"
    plain = await chat(http, model=engine.info.name)
    assert plain.status_code == 200


async def test_texts_and_schedules_are_validated_and_counted(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    where = {"after": ["station"], "outside": [["H", "."]]}
    spec = {"interventions": [{"kind": "add", "vector": "joy"}], "where": where}
    found = await http.post("/v1/steering/validate", json={"steering": spec})
    assert found.json()["valid"], found.text
    assert found.json()["plan"]["interventions"][0]["where"] == where
    wrong = {**spec, "where": {"between": [["a", ""]], "every": {"nth": 0}, "until": ["b"]}}
    found = await http.post("/v1/steering/validate", json={"steering": wrong})
    params = {problem["param"] for problem in found.json()["problems"]}
    assert params == {
        "/steering/where/between/0/1",
        "/steering/where/every/nth",
        "/steering/where/until",
    }
    spec = {**spec, "where": {"every": {"nth": 2}}}
    answer = await chat(http, model=engine.info.name, steering=spec)
    generated = answer.json()["usage"]["completion_tokens"] - 1
    assert answer.json()["steering"]["tokens_steered"] == (generated + 1) // 2
