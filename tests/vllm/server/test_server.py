"""Steer on vLLM's own server: one of `steer serve --engine vllm`, asked over HTTP."""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import safetensors.torch
import torch
from fastapi.testclient import TestClient
from liveness import LIVENESS_SECONDS, eventually
from prometheus_client.parser import text_string_to_metric_families
from steer_vectors import LIBRARY
from vllm_server import running_server

from steer.artefacts.control_vector import ControlVector
from steer.engines.vllm.ticket import _VERSION
from steer_server.serve import build
from steer_server.settings import ServerSettings

MODEL = "steer-demo"
DEMO = LIBRARY / "demo"
QUESTION = "How are you today?"
FRENCH_ANSWER = "Je vais bien, merci."
FRENCH = {"interventions": [{"kind": "add", "vector": "french"}]}
ALL = {"phases": ["prompt", "generation"]}
EVERYWHERE = {"interventions": [{"kind": "add", "vector": "french", "where": ALL}]}
GERMAN = {"interventions": [{"kind": "add", "vector": "german"}]}
CLAMP = {"interventions": [{"kind": "clamp", "sae": "resid-3", "features": [1], "value": 6.0}]}
WIDTH = 192
CONTEXT = 1 << 16
"""Tokens that a sequence may have: a request for most of them does not end by itself before its
client has left it, which takes a few steps."""
ENDLESS = {"max_tokens": CONTEXT - 1000, "ignore_eos": True}
CANCELLED = "steer_requests_total{outcome=cancelled,profile=none}"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    registry = tmp_path_factory.mktemp("server") / "registry"
    context = (f"max_model_len={CONTEXT}", f'hf_overrides={{"max_position_embeddings": {CONTEXT}}}')
    options = [part for option in context for part in ("--engine-option", option)]
    with running_server(registry, *options, STEER_MEASURED_SHARE="0") as found:
        yield found


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIVENESS_SECONDS
    ) as connected:
        yield connected


@pytest.fixture(scope="module")
def ask(client: openai.OpenAI) -> Callable[..., Any]:
    """A greedy chat; `steering` goes beside OpenAI's fields."""

    def chat(question: str = QUESTION, steering: Any = None, **fields: Any) -> Any:
        extra = dict(fields.pop("extra_body", {}))
        if steering is not None:
            extra["steering"] = steering
        return client.chat.completions.create(
            **{
                "model": MODEL,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": 24,
                "extra_body": extra,
                **fields,
            }
        )

    return chat


def text(answer: Any, choice: int = 0) -> str:
    return str(answer.choices[choice].message.content)


def receipt(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["steering"]
    return found


def fed(found: dict[str, Any]) -> int:
    return int(found["tokens_steered"] + found["tokens_skipped"])


def body(question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24, **fields}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def metrics(http: httpx.Client) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def wait_until_idle(http: httpx.Client) -> None:
    """Asks until nothing runs and no slot is taken."""

    def busy() -> list[str]:
        now = metrics(http)
        names = [name for name in now if name.startswith("vllm:num_requests_running")]
        return [n for n in (*names, "steer_slots_in_use", "steer_sequences_running") if now[n]]

    eventually(busy, lambda names: not names)


def wait_until_cancelled(http: httpx.Client, before: float) -> None:
    """Asks until one more client than `before` is known to have left."""
    eventually(lambda: metrics(http).get(CANCELLED, 0), lambda now: now == before + 1)


# What vLLM's routes answer


def test_a_vector_steers_and_leaves_the_others_alone(ask: Callable[..., Any]) -> None:
    before = ask()
    steered = ask(steering=FRENCH)
    after = ask()
    assert text(steered) == FRENCH_ANSWER
    assert text(before) == text(after) != FRENCH_ANSWER
    assert before.usage == after.usage
    assert "steering" not in (before.model_extra or {})


def test_the_receipt_is_exact(ask: Callable[..., Any]) -> None:
    answer = ask(steering=EVERYWHERE, extra_body={"receipt": "full"})
    found = receipt(answer)
    assert found["tokens_steered"] == answer.usage.total_tokens - 1
    assert found["tokens_skipped"] == 0
    assert [point["tokens"] for point in found["hook_points"]] == [found["tokens_steered"]]
    assert found["hook_points"][0]["relative_size"] > 0
    assert "relative_size" not in receipt(ask(steering=EVERYWHERE))["hook_points"][0]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_ends_with_the_receipt(http: httpx.Client, usage: bool) -> None:
    whole = http.post("/v1/chat/completions", json=body(steering=FRENCH)).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    streamed = http.post("/v1/chat/completions", json=body(steering=FRENCH, stream=True, **options))
    chunks = events(streamed)
    assert chunks[-1]["steering"] == whole["steering"]
    assert not any("steering" in chunk for chunk in chunks[:-1])
    parts = [choice["delta"].get("content") or "" for c in chunks for choice in c["choices"]]
    assert "".join(parts) == whole["choices"][0]["message"]["content"]
    assert len(parts) > 4
    assert bool(chunks[-1].get("usage")) == usage


def test_a_plain_stream_has_nothing_of_ours(http: httpx.Client) -> None:
    chunks = events(http.post("/v1/chat/completions", json=body(stream=True)))
    assert len(chunks) > 4
    assert not any("steering" in chunk for chunk in chunks)


def test_choices_are_summed(ask: Callable[..., Any]) -> None:
    answer = ask(steering=EVERYWHERE, n=3, temperature=1.0, seed=3, max_tokens=12)
    assert len(answer.choices) == 3
    # The prompt counts for each choice, as each feeds it.
    prompt, generated = answer.usage.prompt_tokens, answer.usage.completion_tokens
    assert receipt(answer)["tokens_steered"] == 3 * (prompt - 1) + generated


def test_choices_of_a_stream_are_summed(http: httpx.Client) -> None:
    options = {"stream_options": {"include_usage": True}, "n": 2, "seed": 5, "temperature": 1}
    response = http.post(
        "/v1/chat/completions", json=body(steering=EVERYWHERE, stream=True, **options)
    )
    last = events(response)[-1]
    used = last["usage"]
    assert fed(last["steering"]) == 2 * (used["prompt_tokens"] - 1) + used["completion_tokens"]


def test_several_prompts_share_one_receipt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=["How are", "The sea is", "I"],
        max_tokens=6,
        temperature=0,
        extra_body={"steering": EVERYWHERE},
    )
    assert len(answer.choices) == 3
    assert receipt(answer)["tokens_steered"] == answer.usage.total_tokens - 3


def test_a_stop_string_ends_with_an_exact_receipt(ask: Callable[..., Any]) -> None:
    answer = ask(steering=FRENCH, stop=["bien"])
    assert text(answer) == "Je vais "
    assert answer.choices[0].finish_reason == "stop"
    assert fed(receipt(answer)) == answer.usage.total_tokens - 1


def test_logprobs_are_those_of_the_steered_model(ask: Callable[..., Any]) -> None:
    def first(answer: Any) -> dict[str, float]:
        top = answer.choices[0].logprobs.content[0].top_logprobs
        return {entry.token: entry.logprob for entry in top}

    fields = {"logprobs": True, "top_logprobs": 5, "max_tokens": 2}
    plain, steered = first(ask(**fields)), first(ask(steering=FRENCH, **fields))
    # A French answer may also begin with a marker ("Bref, …"): "Je" has about half.
    assert max(steered, key=steered.__getitem__) == "Je"
    assert steered["Je"] > -1
    assert plain.get("Je", -99.0) < -2


def tool(*moods: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": list(moods)}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": "note", "strict": True, "parameters": schema}}


def no_whitespace(http: httpx.Client) -> dict[str, Any]:
    """Keeps a model that knows no JSON from blanks, which the grammar of a tool call allows."""

    def tokens(text: str) -> set[int]:
        asked = {"model": MODEL, "prompt": text, "add_special_tokens": False}
        return set(http.post("/tokenize", json=asked).json()["tokens"])

    blanks = set().union(*(tokens("a" + blank) for blank in "\r\n\t ")) - tokens("a")
    return {str(token): -100 for token in blanks}


def test_a_tool_call_is_steered(ask: Callable[..., Any], http: httpx.Client) -> None:
    fields = {
        "tools": [tool("triste", "happy")],
        "tool_choice": {"type": "function", "function": {"name": "note"}},
        "max_tokens": 100,
        "logit_bias": no_whitespace(http),
    }
    answer = ask(steering=EVERYWHERE, **fields)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "note"
    assert json.loads(call.function.arguments) == {"mood": "triste"}
    assert fed(receipt(answer)) == answer.usage.total_tokens - 1
    (plain,) = ask(**fields).choices[0].message.tool_calls
    assert json.loads(plain.function.arguments) == {"mood": "happy"}


def test_structured_output_is_steered(ask: Callable[..., Any]) -> None:
    choice = {"structured_outputs": {"choice": ["Je vais bien", "I am well"]}}
    answer = ask(steering=FRENCH, extra_body=choice)
    assert text(answer) == "Je vais bien"
    assert fed(receipt(answer)) == answer.usage.total_tokens - 1
    assert text(ask(extra_body=choice)) == "I am well"


def test_a_json_schema_is_kept(ask: Callable[..., Any]) -> None:
    schema = tool("Je vais bien", "I am well")["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    answer = ask(steering=EVERYWHERE, response_format=form, max_tokens=40)
    assert json.loads(text(answer)) == {"mood": "Je vais bien"}


def test_a_prompt_may_be_token_ids(http: httpx.Client, client: openai.OpenAI) -> None:
    tokens = http.post("/tokenize", json=body()).json()["tokens"]
    answer = client.completions.create(
        model=MODEL,
        prompt=tokens,
        max_tokens=24,
        temperature=0,
        extra_body={"steering": FRENCH},
    )
    assert answer.choices[0].text == FRENCH_ANSWER
    assert answer.usage.prompt_tokens == len(tokens)
    assert fed(receipt(answer)) == answer.usage.total_tokens - 1


def test_a_profile_is_a_model(ask: Callable[..., Any], client: openai.OpenAI) -> None:
    answer = ask(model=f"{MODEL}:french")
    assert text(answer) == FRENCH_ANSWER
    assert receipt(answer)["tokens_steered"] > 0
    listed = {model.id for model in client.models.list()}
    assert {MODEL, f"{MODEL}:french", f"{MODEL}:german"} <= listed
    assert client.models.retrieve(f"{MODEL}:french").id == f"{MODEL}:french"


def test_everything_shipped_resolves(http: httpx.Client, client: openai.OpenAI) -> None:
    """Every profile, and every vector and concept alone; the profiles also answer, side by side."""
    profiles = http.get("/v1/steering/profiles").json()["data"]
    vectors = http.get("/v1/steering/vectors", params={"limit": 1000}).json()["data"]
    shipped = {path.stem for path in DEMO.glob("profiles/*.json")}
    assert shipped == {one["name"] for one in profiles}
    files = [*DEMO.glob("vectors/*.safetensors"), *DEMO.glob("relations/*.safetensors")]
    assert {path.stem for path in files} <= {one["name"] for one in vectors}
    specs = [one["spec"] for one in profiles]
    specs += [{"interventions": [{"kind": "add", "vector": path.stem}]} for path in files]
    for spec in specs:
        found = http.post("/v1/steering/validate", json={"steering": spec}).json()
        assert found["valid"], found

    def answer(name: str) -> str:
        asked = {"model": f"{MODEL}:{name}", "max_tokens": 4, "temperature": 0}
        messages: Any = [{"role": "user", "content": QUESTION}]
        return text(client.chat.completions.create(**asked, messages=messages))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(answer, sorted(shipped)))


def test_compare_and_inspect(http: httpx.Client) -> None:
    plain = http.post("/v1/chat/completions", json=body()).json()
    answer = http.post(
        "/v1/chat/completions",
        json=body(steering=FRENCH, compare=True, inspect={"layers": [5], "top": 1}),
    ).json()
    assert answer["choices"][0]["message"]["content"] == FRENCH_ANSWER
    assert answer["default"] == plain["choices"]
    (cell,) = answer["inspect"]["cells"]
    assert cell["top"][0]["token"] == "Je"
    bare = http.post("/v1/chat/completions", json=body(inspect={"layers": [5], "top": 1})).json()
    assert bare["inspect"]["cells"][0]["top"][0]["token"] != "Je"
    assert bare["choices"] == plain["choices"]
    assert "steering" not in bare


def test_compare_streams_both_answers_side_by_side(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    """OpenAI's own client puts the steered answer together, and hands `default` out beside it."""
    asked = {"temperature": 0.8, "seed": 3, "n": 2, "steering": FRENCH, "compare": True}
    fields = body(**asked, stop=["."])
    whole = http.post("/v1/chat/completions", json=fields).json()
    extra = {name: fields.pop(name) for name in ("steering", "compare")}
    usage = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options=usage, extra_body=extra
        )
    )
    said, default = ["", ""], ["", ""]
    for chunk in chunks:
        beside = (chunk.model_extra or {}).get("default", [])
        assert not (chunk.choices and beside)
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
        for one in beside:
            default[one["index"]] += one["delta"].get("content") or ""
    assert said == [one["message"]["content"] for one in whole["choices"]]
    assert default == [one["message"]["content"] for one in whole["default"]]
    assert len({chunk.id for chunk in chunks}) == 1
    given = ["steering" in (chunk.model_extra or {}) for chunk in chunks]
    assert given.index(True) == len(chunks) - 1
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["steering"] == whole["steering"]
    counted = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [one.completion_tokens for one in counted] == [whole["usage"]["completion_tokens"]]


# Responses


@pytest.fixture(scope="module")
def respond(client: openai.OpenAI) -> Callable[..., Any]:
    """A greedy response, or its events; `steering` goes beside OpenAI's fields."""

    def create(steering: Any = None, **fields: Any) -> Any:
        extra = dict(fields.pop("extra_body", {}))
        if steering is not None:
            extra["steering"] = steering
        return client.responses.create(
            **{
                "model": MODEL,
                "input": QUESTION,
                "temperature": 0,
                "max_output_tokens": 24,
                "extra_body": extra,
                **fields,
            }
        )

    return create


def test_a_response_has_its_receipt(respond: Callable[..., Any], ask: Callable[..., Any]) -> None:
    plain, steered = respond(), respond(steering=EVERYWHERE, extra_body={"receipt": "full"})
    assert "steering" not in plain.model_extra
    assert plain.output_text == text(ask())
    assert steered.output_text == text(ask(steering=EVERYWHERE))
    found = receipt(steered)
    assert found["tokens_steered"] == steered.usage.total_tokens - 1
    assert found["hook_points"][0]["relative_size"] > 0
    assert receipt(respond(model=f"{MODEL}:french"))["tokens_steered"] == 1


@pytest.mark.parametrize("limit", [24, 3])
def test_a_streamed_response_ends_with_the_receipt(respond: Callable[..., Any], limit: int) -> None:
    whole = respond(steering=FRENCH, max_output_tokens=limit)
    events = list(respond(steering=FRENCH, max_output_tokens=limit, stream=True))
    last = events[-1].response
    assert last.model_extra["steering"] == receipt(whole)
    assert last.output_text == whole.output_text
    assert not any("steering" in event.model_dump_json() for event in events[:-1])
    said = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(said) == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert not any("steering" in event.model_dump_json() for event in respond(stream=True))


def test_a_response_is_compared_and_read(respond: Callable[..., Any]) -> None:
    plain = respond()
    both = respond(steering=FRENCH, extra_body={"compare": True, "inspect": {"layers": [5]}})
    assert both.output_text == FRENCH_ANSWER
    (default,) = both.model_extra["default"]
    assert default["content"][0]["text"] == plain.output_text
    assert both.model_extra["inspect"]["cells"]


def test_mistakes_in_a_response_are_named(http: httpx.Client) -> None:
    def error(**fields: Any) -> tuple[int, str, str]:
        asked = {"model": MODEL, "input": QUESTION, "max_output_tokens": 8, **fields}
        response = http.post("/v1/responses", json=asked)
        found = response.json()["error"]
        return response.status_code, found["code"], found["param"]

    unknown = {"interventions": [{"kind": "add", "vector": "frnch"}]}
    assert error(steering=unknown) == (400, "unknown_vector", "/steering/interventions/0/vector")
    assert error(model=f"{MODEL}:nobody") == (404, "model_not_found", "/model")
    assert error(steering=FRENCH, background=True)[1:] == ("unsupported_parameter", "/background")
    assert error(steering=FRENCH, compare=True, stream=True)[2] == "/compare"


# Refusals


def test_mistakes_are_named(http: httpx.Client) -> None:
    def error(**fields: Any) -> tuple[int, str, str]:
        response = http.post("/v1/chat/completions", json=body(**fields))
        found = response.json()["error"]
        return response.status_code, found["code"], found["param"]

    unknown = {"interventions": [{"kind": "add", "vector": "frnch"}]}
    assert error(steering=unknown) == (400, "unknown_vector", "/steering/interventions/0/vector")
    assert error(steering={"interventions": []})[0] == 400
    assert error(model=f"{MODEL}:nobody") == (404, "model_not_found", "/model")
    assert error(model=f"{MODEL}:french", steering=FRENCH)[1] == "steering_conflict"
    assert error(compare=True)[1] == "nothing_to_compare"
    assert error(compare=True, stream=True)[1] == "nothing_to_compare"
    assert error(steering=FRENCH, receipt="long")[2] == "/receipt"
    assert error(steering=FRENCH, use_beam_search=True, n=2)[2] == "/use_beam_search"


def test_a_ticket_made_by_hand_is_refused(http: httpx.Client) -> None:
    steering = {"fingerprint": "x", "plan": "0" * 64, "rows": 1, "selections": []}
    ticket = {
        "v": _VERSION,
        "key": "mine",
        "n": 1,
        "steering": json.dumps(steering),
        "measure": False,
    }
    xargs = {"vllm_xargs": {"steer": json.dumps(ticket)}}
    response = http.post("/v1/chat/completions", json=body(**xargs))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_ticket"
    other = {"model": MODEL, "input": QUESTION, "max_output_tokens": 8, **xargs}
    response = http.post("/v1/responses", json=other)
    assert response.status_code == 400
    assert "only the server itself writes" in response.json()["error"]["message"]


def test_the_errors_of_vllm_are_its_own(http: httpx.Client) -> None:
    for fields in ({"temperature": "hot"}, {"model": "nobody"}, {"n": -1}):
        plain = http.post("/v1/chat/completions", json=body(**fields))
        steered = http.post("/v1/chat/completions", json=body(steering=FRENCH, **fields))
        assert 400 <= plain.status_code < 500
        assert steered.json() == plain.json()
        assert isinstance(plain.json()["error"]["code"], int)


def test_other_routes_take_a_spec_as_an_argument_and_as_no_field(http: httpx.Client) -> None:
    asked = body()
    before = metrics(http)["steer_tokens_total{treatment=steered}"]
    answer = http.post(
        "/v1/messages", json={**asked, "vllm_xargs": {"steering": json.dumps(FRENCH)}}
    ).json()
    assert answer["content"][0]["text"] == FRENCH_ANSWER
    steered = "steer_tokens_total{treatment=steered}"
    eventually(lambda: metrics(http)[steered], lambda now: now > before)
    unknown = json.dumps({"interventions": [{"kind": "add", "vector": "frnch"}]})
    refused = http.post("/v1/messages", json={**asked, "vllm_xargs": {"steering": unknown}})
    assert refused.status_code == 400
    assert "frnch" in refused.json()["error"]["message"]
    unheard = http.post("/v1/messages", json={**asked, "steering": FRENCH})
    assert unheard.status_code == 400
    assert unheard.json()["error"]["param"] == "/steering"


# Artefacts


def vector_file() -> bytes:
    generator = torch.Generator().manual_seed(7)
    rows = {layer: torch.randn(WIDTH, generator=generator) for layer in (2, 3)}
    return ControlVector.of(rows).to_bytes()


def test_an_upload_steers_the_next_request_while_a_stream_runs(http: httpx.Client) -> None:
    """One stream is read to its end afterwards; the other runs until it is left, so that there is
    one all the time."""
    wait_until_idle(http)
    before = metrics(http).get(CANCELLED, 0)
    long = body(steering=FRENCH, stream=True, max_tokens=200, ignore_eos=True)
    endless = body(steering=GERMAN, stream=True, **ENDLESS)
    with (
        http.stream("POST", "/v1/chat/completions", json=endless) as other,
        http.stream("POST", "/v1/chat/completions", json=long) as running,
    ):
        # Held: an iterator that is dropped closes its connection.
        endlessly, lines = other.iter_lines(), running.iter_lines()
        assert next(endlessly).startswith("data: ")
        assert next(lines).startswith("data: ")
        uploaded = http.post(
            "/v1/steering/vectors",
            files={"file": ("noise.safetensors", io.BytesIO(vector_file()))},
        )
        assert uploaded.status_code == 201, uploaded.text
        spec = {
            "interventions": [{"kind": "add", "vector": "noise", "strength": 3.0, "where": ALL}]
        }
        answer = http.post("/v1/chat/completions", json=body(steering=spec)).json()
        assert answer["steering"]["tokens_steered"] == answer["usage"]["total_tokens"] - 1
        assert len(answer["steering"]["hook_points"]) == 2
        rest = [line for line in lines if line]
        eventually(lambda: metrics(http)["steer_sequences_running"], lambda now: now == 1)
        assert metrics(http).get(CANCELLED, 0) == before
    assert rest[-1] == "data: [DONE]"
    assert "steering" in json.loads(rest[-2].removeprefix("data: "))
    wait_until_cancelled(http, before)
    wait_until_idle(http)
    valid = http.post("/v1/steering/validate", json={"steering": spec}).json()
    assert valid["valid"]
    assert http.delete("/v1/steering/vectors/noise").json()["deleted"]
    assert http.get("/v1/steering/vectors/noise").status_code == 404
    gone = http.post("/v1/chat/completions", json=body(steering=spec))
    assert gone.status_code == 400
    again = http.post("/v1/steering/validate", json={"steering": spec}).json()
    assert not again["valid"]
    assert again["problems"][0]["code"] == "unknown_vector"


def test_our_routes_answer_errors_in_our_form(http: httpx.Client) -> None:
    bad = http.post("/v1/steering/vectors", files={"file": ("x.gguf", b"GGUFnonsense")})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "/file"
    assert http.post("/v1/steering/validate", json={}).json()["error"]["code"] == "missing_field"
    plain = http.post("/v1/steering/validate", content="{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    assert http.get("/v1/steering/vectors", params={"limit": 0}).status_code == 400


# Inspection and operation


def test_inspection_runs_on_the_served_engine(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    lens = http.post(
        "/v1/inspect/logit-lens",
        json={"messages": messages, "layers": [5], "positions": [-1], "top": 1, "steering": FRENCH},
    ).json()
    assert lens["cells"][0]["top"][0]["token"] == "Je"
    scope = http.post(
        "/v1/inspect/patchscope",
        json={"source": {"messages": messages, "steering": FRENCH}, "layers": [4]},
    )
    assert scope.status_code == 200, scope.text
    assert scope.json()["object"] == "inspect.patchscope"
    seen = http.post(
        "/v1/inspect/activations",
        json={"text": "The sea is cold", "layers": [2], "vectors": ["french"]},
    )
    assert seen.status_code == 200, seen.text


def test_metrics_are_vllms_and_ours(ask: Callable[..., Any], http: httpx.Client) -> None:
    wait_until_idle(http)
    before = metrics(http)
    answer = ask(steering=EVERYWHERE)
    ask()

    ours = "steer_requests_total{outcome=ok,profile=none}"

    def counted(found: dict[str, float]) -> bool:
        names = [name for name in found if name.startswith("vllm:request_success_total{")]
        served = sum(found[name] - before.get(name, 0.0) for name in names)
        return served == 2 and found[ours] > before.get(ours, 0.0)

    after = eventually(lambda: metrics(http), counted)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown(ours) == 1
    assert grown("steer_vector_requests_total{outcome=ok,vector=french}") == 1
    assert grown("steer_tokens_total{treatment=steered}") == answer.usage.total_tokens - 1
    assert grown("steer_time_to_first_token_seconds_count{steered=true}") == 1
    assert after["steer_slots"] == 16
    assert after["steer_registry_artefacts{kind=vector}"] >= 7


def test_the_server_says_what_it_can(http: httpx.Client) -> None:
    able = http.get("/v1/steering/capabilities").json()
    assert able["model"]["id"] == able["model"]["name"] == MODEL
    assert "origin" not in able["model"]
    assert able["engine"]["strength_units"] == ["multiple", "norm", "kl", "effect", "auto"]
    assert str(LIBRARY) not in str(able)
    assert able["engine"]["engine"] == "vllm"
    assert {"add", "clamp", "patch"} <= set(able["engine"]["kinds"])
    assert http.get("/health").content == b""
    assert http.get("/v1/steering/health").json()["status"] == "ok"
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/steering/vectors", "/v1/inspect/logit-lens"} <= set(paths)


def test_an_upload_has_to_fit_the_model_or_name_another(http: httpx.Client) -> None:
    url, width = "/v1/steering/vectors", 192
    misfits = {
        "wrong_width": ControlVector.of({2: torch.ones(width + 1)}),
        "layer_out_of_range": ControlVector.of({2: torch.ones(width), 6: torch.ones(width)}),
    }
    for code, vector in misfits.items():
        files = {"file": ("misfit.safetensors", vector.to_bytes())}
        refused = http.post(url, files=files)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
        taken = http.post(url, files=files, data={"model": "another"})
        assert taken.status_code == 201, taken.text
        # The bare name is the other model's alone, so that it is removed exactly.
        assert http.delete(f"{url}/misfit").status_code == 404
        exact = f"misfit@{taken.json()['sha256'][:12]}"
        assert http.delete(f"{url}/{exact}").status_code == 200


def test_some_layers_of_a_vector_can_be_had(http: httpx.Client) -> None:
    url = "/v1/steering/vectors/french/content"
    some = http.get(url, params={"format": "gguf", "layers": "1-3"})
    assert some.status_code == 200, some.text
    assert some.content.startswith(b"GGUF")
    for layers, format in (("3-1", "gguf"), ("x", "safetensors"), ("0-2", "gguf")):
        refused = http.get(url, params={"format": format, "layers": layers})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "/layers")


def test_mixed_requests_answer_as_each_does_alone(http: httpx.Client) -> None:
    questions = ["How are you today?", "What is the capital of France?", "Tell me about the sea."]
    specs: list[Any] = [None, FRENCH, GERMAN, EVERYWHERE, CLAMP]
    bodies = [
        body(question, **({} if spec is None else {"steering": spec}))
        for question in questions
        for spec in specs
        for _ in range(2)
    ]

    def answered(one: dict[str, Any]) -> tuple[str, Any]:
        found = http.post("/v1/chat/completions", json=one).json()
        applied = found.get("steering")
        # What came from the cache depends on who was there before.
        return found["choices"][0]["message"]["content"], applied and {
            **applied,
            "tokens_cached": None,
        }

    alone = [answered(one) for one in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(answered, bodies))
    assert together == alone
    assert len({content for content, _ in alone}) >= 8


def test_a_client_that_leaves_frees_its_slot(http: httpx.Client) -> None:
    wait_until_idle(http)
    before = metrics(http).get(CANCELLED, 0)
    long = body(steering=FRENCH, stream=True, **ENDLESS)
    with http.stream("POST", "/v1/chat/completions", json=long) as running:
        lines = running.iter_lines()  # held: dropped, it would close the connection
        assert next(lines).startswith("data: ")
        eventually(lambda: metrics(http)["steer_slots_in_use"], lambda taken: taken == 1)
    wait_until_cancelled(http, before)
    wait_until_idle(http)
    answer = http.post("/v1/chat/completions", json=body(steering=FRENCH)).json()
    assert answer["choices"][0]["message"]["content"] == FRENCH_ANSWER


def test_a_client_that_hangs_up_at_once_is_counted_and_forgotten(
    http: httpx.Client, url: str
) -> None:
    before = metrics(http).get(CANCELLED, 0)
    content = json.dumps(body(steering=FRENCH, **ENDLESS)).encode()
    place = httpx.URL(url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {place.host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((place.host, place.port or 80)) as connection:
        connection.sendall(head.encode() + content)
    wait_until_cancelled(http, before)
    wait_until_idle(http)


def test_vectors_may_be_in_the_request(http: httpx.Client) -> None:
    stored = http.get("/v1/steering/vectors/french/content").content
    vector = {"data": base64.b64encode(stored).decode()}
    spec = {"interventions": [{"kind": "add", "vector": vector}]}
    found = http.post("/v1/chat/completions", json=body(steering=spec)).json()
    assert found["choices"][0]["message"]["content"] == FRENCH_ANSWER
    assert fed(found["steering"]) == found["usage"]["total_tokens"] - 1


# Jobs


def test_a_vector_is_fitted_while_it_serves(http: httpx.Client, ask: Callable[..., Any]) -> None:
    pairs = [
        {
            "positive": [{"role": "user", "content": f"Réponds en français : {n} ?"}],
            "negative": [{"role": "user", "content": f"Answer in English: {n}?"}],
        }
        for n in range(8)
    ]
    asked = http.post("/v1/steering/fit", json={"name": "fitted", "pairs": pairs, "layers": [2]})
    assert asked.status_code == 202, asked.text
    with http.stream("GET", f"/v1/jobs/{asked.json()['id']}/events") as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    job = json.loads(lines[-1].removeprefix("data: "))
    assert (job["state"], job["error"]) == ("succeeded", None)
    gap = job["result"]["measures"]["2"]
    assert gap["positive"] > gap["negative"]
    spec = {"interventions": [{"kind": "add", "vector": job["result"]["vector"]}]}
    assert ask(steering=spec).model_extra["steering"]["tokens_steered"] > 0
    listed = http.get("/v1/jobs", params={"kind": "fit"}).json()["data"]
    assert [one["id"] for one in listed] == [job["id"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": "", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"min_tokens": None, "ignore_eos": None, "n": None, "stop": None, "receipt": None},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "response_format": {"type": "text"}},
        {"logprobs": False, "top_logprobs": 0, "store": True, "max_tokens": 16.0},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 16,
        "steering": FRENCH,
    }
    found = http.post("/v1/chat/completions", json={**body, **fields})
    assert found.status_code == 200, found.text
    plain = http.post("/v1/chat/completions", json=body).json()
    content = found.json()["choices"][0]["message"]["content"]
    assert content == plain["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The transformers engine's server over the same model and the same artefacts."""
    settings = ServerSettings(registry=str(tmp_path_factory.mktemp("other") / "registry"))
    with TestClient(build(settings), base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("steering", [None, EVERYWHERE])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_both_servers_score_a_text_alike(
    http: httpx.Client, other: TestClient, steering: Any, max_tokens: int
) -> None:
    asked = {"model": MODEL, "prompt": QUESTION}
    body = {
        "model": MODEL,
        "prompt": http.post("/tokenize", json=asked).json()["tokens"],
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "temperature": 0,
        **({} if steering is None else {"steering": steering}),
    }
    texts, scores = [], []
    for server in (http, other):
        found = server.post("/v1/completions", json=body)
        assert found.status_code == 200, found.text
        (choice,) = found.json()["choices"]
        texts.append(choice["text"])
        scores.append(choice["logprobs"]["token_logprobs"])
        assert ("steering" in found.json()) is (steering is not None)
    assert texts[0] == texts[1]
    assert scores[0][0] is scores[1][0] is None
    assert scores[0][1:] == pytest.approx(scores[1][1:], abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7, "repetition_penalty": 1.4},
        {"repetition_penalty": 0.8},
        {"logit_bias": {"5": -100, "20": 3.5}},
        {"min_tokens": 30, "max_tokens": 40},
    ],
)
@pytest.mark.parametrize("steering", [None, FRENCH])
def test_both_servers_choose_the_same_tokens(
    http: httpx.Client, other: TestClient, fields: dict[str, Any], steering: Any
) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 24,
        **({} if steering is None else {"steering": steering}),
        **fields,
    }
    texts = []
    for server in (http, other):
        found = server.post("/v1/chat/completions", json=body)
        assert found.status_code == 200, found.text
        texts.append(found.json()["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]


def test_requests_have_ids_here_too(http: httpx.Client) -> None:
    for path, status in (("/v1/models", 200), ("/v1/steering/vectors/nothing", 404)):
        found = http.get(path, headers={"X-Request-ID": "mine"})
        assert found.status_code == status
        assert found.headers.get_list("x-request-id") == ["mine"]
    assert found.json()["error"]["request_id"] == "mine"


def test_states_come_as_a_file(http: httpx.Client) -> None:
    body = {"text": "word " * 200, "steering": EVERYWHERE}
    found = http.post(
        "/v1/inspect/activations", json=body, headers={"accept": "application/octet-stream"}
    )
    assert found.status_code == 200
    states = safetensors.torch.load(found.content)
    rows = len(states["positions"])
    assert rows * WIDTH * (len(states) - 1) > 1 << 16
    assert states["layers.0"].shape == (rows, WIDTH)
