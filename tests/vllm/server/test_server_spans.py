"""Spans on vLLM's own server: whose words, after which text, outside of what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from liveness import LIVENESS_SECONDS
from transformers import AutoTokenizer
from vllm_engine import DEMO_MODEL
from vllm_server import running_server

from steer.prompts.roles import chat_roles

MODEL = "steer-demo"
MESSAGES = [
    {"role": "user", "content": "How are you today?"},
    {"role": "assistant", "content": "I am well, thank you."},
    {"role": "user", "content": "Where is the station?"},
]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    registry = tmp_path_factory.mktemp("server") / "registry"
    with (
        running_server(registry, STEER_MEASURED_SHARE="0") as url,
        httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as client,
    ):
        yield client


def french(where: dict[str, Any], strength: float = 1.0) -> dict[str, Any]:
    item = {"kind": "add", "vector": "french", "strength": strength}
    return {"interventions": [item], "where": where}


def chat(http: httpx.Client, spec: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24, **fields}
    if spec is not None:
        body["steering"] = spec
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("roles", [["user"], ["assistant"], ["user", "assistant"], ["system"]])
@pytest.mark.parametrize("parts", [False, True], ids=["text", "parts"])
def test_the_words_of_a_role_are_those_of_its_messages(
    http: httpx.Client, roles: list[str], parts: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    spans = chat_roles(tokenizer, MESSAGES).ranges
    prompt = sum(end - start for start, end, role in spans if role in roles)
    assert prompt > 0 or roles == ["system"]
    messages: list[dict[str, Any]] = MESSAGES
    if parts:
        messages = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in MESSAGES
        ]
    for _ in range(2):  # the second finds its prompt in the cache
        answer = chat(http, french({"roles": roles}), messages=messages)
        fed = answer["usage"]["completion_tokens"] - 1
        wanted = prompt + (fed if "assistant" in roles else 0)
        assert answer["steering"]["tokens_steered"] == wanted
    assert chat(http)["choices"] == chat(http, french({"roles": ["tool"]}))["choices"]


def test_roles_are_said_in_a_profile_and_read_by_inspections(http: httpx.Client) -> None:
    spec = french({"roles": ["user"]})
    saved = http.post("/v1/steering/profiles", json={"name": "users", "spec": spec})
    assert saved.status_code == 200, saved.text
    inspect = {"kind": "logit_lens", "layers": [2], "positions": [-1]}
    by_name = chat(http, model=f"{MODEL}:users", inspect=inspect)
    assert by_name["steering"] | {"gates": []} == chat(http, spec)["steering"] | {"gates": []}
    plain = chat(http, inspect=inspect)["inspect"]
    assert by_name["inspect"]["cells"] != plain["cells"]


def said(text: str, role: str = "user", **more: Any) -> dict[str, Any]:
    """A message as /v1/responses takes it."""
    return {"type": "message", "role": role, "content": text, **more}


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"input": "Where is the station?"}, [said("Where is the station?")]),
        (
            {"instructions": "Be brief.", "input": [said("Where is it?")]},
            [said("Be brief.", "system"), said("Where is it?")],
        ),
        (
            {
                "input": [
                    said("Where is the station?"),
                    said("Here.", "assistant", id="msg_1", status="completed")
                    | {"content": [{"type": "output_text", "text": "Here.", "annotations": []}]},
                    said("") | {"content": [{"type": "input_text", "text": "Where?"}]},
                ]
            },
            [said("Where is the station?"), said("Here.", "assistant"), said("Where?")],
        ),
    ],
    ids=["a text", "instructions", "a conversation"],
)
def test_the_messages_of_a_response_have_roles(
    http: httpx.Client, role: str, fields: dict[str, Any], turns: list[dict[str, Any]]
) -> None:
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 8, **fields}
    answer = http.post("/v1/responses", json={**asked, "steering": french({"roles": [role]})})
    assert answer.status_code == 200, answer.text
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    spans = chat_roles(tokenizer, turns).ranges
    wanted = sum(end - start for start, end, whose in spans if whose == role)
    fed = answer.json()["usage"]["output_tokens"] - 1
    assert answer.json()["steering"]["tokens_steered"] == wanted + fed * (role == "assistant")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Where is the station?"}),
        ("/v1/responses", {"input": "Where?", "previous_response_id": "resp_1"}),
    ],
)
def test_what_brings_no_messages_has_no_roles(
    http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    for steering in (french({"roles": ["user"]}), french({"except": {"roles": ["user"]}})):
        answer = http.post(path, json={"model": MODEL, "steering": steering, **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "no_messages")
        assert error["param"].startswith("/steering/where/")
    xargs = {"steering": json.dumps(french({"roles": ["user"]}))}
    answer = http.post(path, json={"model": MODEL, "vllm_xargs": xargs, **fields})
    assert answer.status_code == 400, answer.text


def test_what_follows_a_text_is_steered(http: httpx.Client) -> None:
    plain = chat(http, logprobs=True)["choices"][0]
    tokens = [one["token"] for one in plain["logprobs"]["content"]]
    asked = "".join(turn["content"] for turn in MESSAGES)
    place = next(n for n, text in enumerate(tokens) if n and text.strip() and text not in asked)
    where = {"phases": ["generation"], "after": [tokens[place]]}
    answer = chat(http, french(where, 1e-6))
    assert answer["choices"][0]["message"]["content"] == plain["message"]["content"]
    fed = answer["usage"]["completion_tokens"] - 1
    assert answer["steering"]["tokens_steered"] == fed - place - 1


def no_whitespace(http: httpx.Client) -> dict[str, int]:
    """Keeps a model that knows no JSON from blanks, which the grammar of a tool call allows."""

    def tokens(text: str) -> set[int]:
        asked = {"model": MODEL, "prompt": text, "add_special_tokens": False}
        return set(http.post("/tokenize", json=asked).json()["tokens"])

    blanks = set().union(*(tokens("a" + blank) for blank in "\r\n\t ")) - tokens("a")
    return {str(token): -100 for token in blanks}


SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["triste", "happy"]}},
    "required": ["mood"],
    "additionalProperties": False,
}
CALL = {
    "tools": [
        {
            "type": "function",
            "function": {"name": "note", "strict": True, "parameters": SCHEMA},
        }
    ],
    "tool_choice": {"type": "function", "function": {"name": "note"}},
}
JSON = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA}}
}


@pytest.mark.parametrize(
    ("form", "opening"), [(CALL, "<tool_call>"), (JSON, "{")], ids=["a tool call", "JSON"]
)
def test_an_answer_that_a_spec_leaves_out_is_the_same_to_the_byte(
    http: httpx.Client, form: dict[str, Any], opening: str
) -> None:
    """Beside it the same steering everywhere, which changes what is said."""
    asked = {
        **form,
        "messages": [{"role": "user", "content": "How are you today?"}],
        "max_tokens": 100,
        "logit_bias": no_whitespace(http),
    }
    plain = chat(http, **asked)["choices"][0]["message"]
    spared = {"phases": ["generation"], "outside": [[opening, None]]}
    found = chat(http, french(spared, 8.0), **asked)
    assert found["steering"]["tokens_steered"] == 0
    steered = chat(http, french({"phases": ["prompt", "generation"]}), **asked)
    for field in ("content", "tool_calls"):
        mine, theirs = (
            _without_ids(one.get(field)) for one in (plain, found["choices"][0]["message"])
        )
        assert mine == theirs
    other = steered["choices"][0]["message"]
    assert (other["content"], _without_ids(other.get("tool_calls"))) != (
        plain["content"],
        _without_ids(plain.get("tool_calls")),
    )


def _without_ids(calls: Any) -> Any:
    """A tool call's id is drawn anew."""
    return [one["function"] for one in calls] if isinstance(calls, list) else calls
