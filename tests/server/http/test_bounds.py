"""What one request may cost the others: bodies, lists, prompts, inspections, a server's end."""

from __future__ import annotations

import asyncio
import http.client as http_client
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint
from fastapi import FastAPI, Request
from liveness import LIVENESS_SECONDS

from steer.engines.fake.engine import FakeEngine
from steer.errors import CapacityError, SteerError
from steer.inspection import METHODS
from steer.jobs import builtin_kinds
from steer.prompts import check_text_length
from steer.spec import MAX_INTERVENTIONS, SteeringSpec
from steer_server.app import create_app, routers
from steer_server.generation.request_models import ChatRequest, CompletionRequest
from steer_server.generation.responses.request import ResponsesRequest
from steer_server.http.error_route import SteerRoute
from steer_server.http.json_body import MAX_CONTAINERS, MAX_DEPTH, MAX_KEYS
from steer_server.http.shutdown import AnswerCutOff
from steer_server.inspection_queue import InspectionQueue
from steer_server.openapi import openapi_document

Body = Callable[..., dict[str, Any]]
JSON = {"content-type": "application/json"}


# Lists


BODIES = [
    SteeringSpec,
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    *(method.request for method in METHODS),
    *(kind.params for kind in builtin_kinds().values()),
]
SHORT = 64
"""Items, each of which may be named as wrong."""


def lists(schema: Any) -> Iterator[dict[str, Any]]:
    """The schemas of all lists in one of pydantic's core schemas."""
    if isinstance(schema, list | tuple):
        for one in schema:
            yield from lists(one)
    elif isinstance(schema, dict):
        if str(schema.get("ref", "")).startswith("pydantic.types.JsonValue"):
            return  # of which nothing can be wrong
        if schema.get("type") in ("list", "set", "frozenset") or "variadic_item_index" in schema:
            yield schema
        for key, value in schema.items():
            if key not in ("metadata", "serialization", "json_schema_input_schema"):
                yield from lists(value)


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_every_list_has_an_end_and_stops_at_its_first_error(model: Any) -> None:
    for schema in lists(model.__pydantic_core_schema__):
        most = schema.get("max_length")
        assert most is not None, schema
        assert schema.get("fail_fast") or most <= SHORT, schema


WRONG = [
    ("/v1/chat/completions", {"steering": {"interventions": [0] * 200_000}}),
    ("/v1/chat/completions", {"messages": [0] * 200_000}),
    ("/v1/chat/completions", {"stop": [0] * 200_000}),
    ("/v1/responses", {"input": [0] * 200_000}),
    ("/v1/completions", {"prompt": ["a", *[0] * 200_000]}),
    ("/v1/completions", {"prompt": [["a"] * 200_000]}),
    ("/v1/inspect/logit-lens", {"text": "a", "positions": [[]] * 200_000}),
    ("/v1/steering/fit", {"name": "a", "pairs": [0] * 200_000}),
]


@pytest.mark.parametrize(("route", "fields"), WRONG)
async def test_a_wrong_list_is_refused_by_its_first_item(
    http: httpx.AsyncClient, chat: Body, route: str, fields: dict[str, Any]
) -> None:
    body = {**(chat() if "chat" in route else {"model": "fake-model"} if "v1/c" in route else {})}
    response = await http.post(route, json={**body, **fields})
    assert response.status_code in (400, 413)
    assert "more problems" not in response.text or "(and 1 more" in response.text


async def test_every_wrong_intervention_of_a_spec_is_still_named(http: httpx.AsyncClient) -> None:
    spec = {"interventions": [0] * MAX_INTERVENTIONS}
    response = await http.post("/v1/steering/validate", json={"steering": spec})
    assert len(response.json()["problems"]) == MAX_INTERVENTIONS


# JSON

DEEP = "[" * 10_000 + "]" * 10_000
TEXTS = {
    "deep": DEEP,
    "deep inside": f'{{"steering": {DEEP}}}',
    "deep and broken": '{"a":' * 10_000,
    "a key twice": '{"model": "fake-model", "model": "fake-model"}',
    "many keys": json.dumps({f"k{n}": 0 for n in range(MAX_KEYS + 1)}),
    "many lists": f'{{"a": [{"[]," * MAX_CONTAINERS}0]}}',
    "a huge number": f'{{"seed": {"9" * 5000}}}',
    "a surrogate": '{"model": "\\ud800"}',
    "latin-1": '{"model": "é"}'.encode("latin-1"),
    "utf-16": '{"model": "a"}'.encode("utf-16"),
    "a list": "[]",
    "nothing": "",
}


def json_routes() -> list[tuple[str, str]]:
    return [
        (method.upper(), path.replace("{artefacts}", "vectors").replace("{name}", "a"))
        for path, methods in openapi_document()["paths"].items()
        for method, operation in methods.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]


def test_every_route_reads_its_body_with_bounds() -> None:
    routes = [route for router in routers() for route in router.routes]
    assert len(routes) > 60
    assert [route for route in routes if not isinstance(route, SteerRoute)] == []


@pytest.mark.parametrize("kind", TEXTS)
async def test_no_json_route_fails_on_odd_json(
    engine: FakeEngine, http: httpx.AsyncClient, settings: Any, kind: str
) -> None:
    text = TEXTS[kind]
    for method, path in json_routes():
        response = await http.request(method, path, content=text, headers=JSON)
        assert 400 <= response.status_code < 500, (method, path, response.text)
        assert response.json()["error"]["code"], (method, path)


async def test_depth_has_a_bound_of_its_own(http: httpx.AsyncClient, chat: Body) -> None:
    def nested(depth: int) -> Any:
        return [] if depth == 0 else [nested(depth - 1)]

    for depth, status in ((MAX_DEPTH - 10, 200), (MAX_DEPTH + 10, 400)):
        body = chat(metadata={"a": nested(depth)})
        assert (await http.post("/v1/chat/completions", json=body)).status_code == status


ODD = [
    ("GET", "/v1/steering/vectors?q=%00"),
    ("GET", "/v1/steering/vectors?model=a%00"),
    ("GET", "/v1/steering/vectors?tag=%00"),
    ("GET", "/v1/steering/vectors/%00"),
    ("GET", "/v1/steering/vectors/a%00b/content"),
    ("GET", "/v1/models/fake-model:%00"),
    ("GET", "/v1/jobs/%00"),
    ("GET", "/v1/jobs?kind=%00"),
    ("GET", "/v1/jobs?limit=99999999999999999999999"),
    ("GET", "/v1/jobs?offset=-1"),
    ("GET", "/v1/steering/saes/features/features/99999999999999999999"),
    *(
        ("GET", f"/v1/steering/vectors/joy/content?layers={layers}")
        for layers in ("", "%00", "9" * 5000, "1-99999999", "%D9%A3", "2,2", "3-2", "%ED%A0%80")
    ),
]


@pytest.mark.parametrize(("method", "path"), ODD)
async def test_odd_paths_and_queries_are_refused(
    http: httpx.AsyncClient, method: str, path: str
) -> None:
    response = await http.request(method, path)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["code"]


@pytest.mark.parametrize("path", ["/v1/steering/vectors", "/v1/steering/import"])
@pytest.mark.parametrize(
    "kind",
    [
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "a" * 500,
        "multipart/form-data; boundary*=utf-8''%ff",
        "multipart/form-data; boundary=\xff",
        "multipart/form-data",
    ],
)
async def test_odd_multipart_headers_are_refused(
    http: httpx.AsyncClient, path: str, kind: str
) -> None:
    headers = {"content-type": kind.encode("latin-1")}
    response = await http.post(path, content=b"--a\r\n\r\nx\r\n--a--", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_multipart"


# Prompts


class Counting:
    """A tokenizer with a token for each `width` characters, that counts what it reads."""

    def __init__(self, width: int) -> None:
        self.width, self.read = width, 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.read += len(text)
        return [0] * (len(text) // self.width)


@pytest.mark.parametrize("width", [1, 4, 20])
def test_a_text_is_refused_by_its_beginning(width: int) -> None:
    tokenizer = Counting(width)
    with pytest.raises(SteerError) as raised:
        check_text_length(tokenizer, "x" * 8_000_000, 256, param="/prompt")
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "/prompt")
    assert tokenizer.read < 256 * 200


def test_a_text_that_fits_is_never_refused() -> None:
    """However many characters one token has."""
    check_text_length(Counting(1000), "x" * 256_000, 256, param=None)
    short = Counting(1)
    check_text_length(short, "x" * 256, 256, param=None)
    assert short.read == 0


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x" * 100_000}, "/prompt"),
        ("/v1/completions", {"prompt": ["a", "x" * 100_000]}, "/prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 1000}] * 100},
            "/messages",
        ),
        ("/v1/inspect/logit-lens", {"text": "x" * 100_000}, "/text"),
        (
            "/v1/inspect/activations",
            {"messages": [{"role": "user", "content": "x" * 100_000}]},
            "/messages",
        ),
        ("/v1/inspect/patchscope", {"source": {"text": "x" * 100_000}}, "/source/text"),
    ],
)
async def test_long_prompts_are_never_tokenised_whole(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    body: dict[str, Any],
    param: str,
) -> None:
    read: list[int] = []
    encode = type(engine.tokenizer).encode

    def counted(self: Any, text: str, *args: Any, **named: Any) -> Any:
        read.append(len(text))
        return encode(self, text, *args, **named)

    monkeypatch.setattr(type(engine.tokenizer), "encode", counted)
    model = {} if "inspect" in route else {"model": "fake-model"}
    response = await http.post(route, json={**model, **body})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "context_length_exceeded",
        param,
    )
    assert max(read) <= 8 * engine.info.max_length


# Inspection, and the threads that all share


class Held:
    """Inspections that wait until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)

    def work(self) -> int:
        self.begun.release()
        assert self.go.wait(LIVENESS_SECONDS)
        return 1


async def test_inspections_queue_and_are_refused_when_the_queue_is_full() -> None:
    queue, held = InspectionQueue(workers=1, queue=2), Held()
    tasks = [asyncio.create_task(queue.run(held.work)) for _ in range(3)]
    await asyncio.to_thread(held.begun.acquire)
    assert (queue.running, queue.waiting) == (1, 2)
    with pytest.raises(CapacityError) as raised:
        await queue.run(held.work)
    assert (raised.value.status, raised.value.code) == (503, "inspection_queue_full")
    # One that leaves while it waits makes room, and is never begun.
    tasks.pop().cancel()
    await checkpoint()
    await checkpoint()
    assert queue.waiting == 1
    held.go.set()
    assert await asyncio.gather(*tasks) == [1, 1]
    assert (queue.running, queue.waiting) == (0, 0)
    assert held.begun.acquire(blocking=False)
    assert not held.begun.acquire(blocking=False)


async def test_a_full_queue_is_told_with_when_to_come_again(
    app: FastAPI, http: httpx.AsyncClient
) -> None:
    held = Held()
    object.__setattr__(app.state.steer, "inspections", InspectionQueue(workers=1, queue=0))
    first = asyncio.create_task(app.state.steer.inspections.run(held.work))
    await asyncio.to_thread(held.begun.acquire)
    for route, body in (
        ("/v1/inspect/logit-lens", {"text": "a"}),
        ("/v1/inspect/patchscope", {"source": {"text": "a"}}),
    ):
        response = await http.post(route, json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "inspection_queue_full"
    held.go.set()
    await first


async def test_probes_answer_while_every_shared_thread_is_taken(http: httpx.AsyncClient) -> None:
    held = Held()
    threads = to_thread.current_default_thread_limiter()
    count = int(threads.total_tokens)
    taken = [asyncio.create_task(to_thread.run_sync(held.work)) for _ in range(count)]
    while threads.available_tokens:
        await checkpoint()
    for path in ("/health", "/metrics"):
        assert (await http.get(path)).status_code == 200
    held.go.set()
    await asyncio.gather(*taken)


# The end of the server


@pytest.mark.parametrize(
    ("path", "start", "sent"),
    [
        ("/v1/chat/completions", None, "503"),
        ("/v1/chat/completions", b"text/event-stream; charset=utf-8", "data: [DONE]\n\n"),
        ("/v1/jobs/1/events", b"text/event-stream", "event: error\n"),
        ("/v1/steering/vectors/a/content", b"application/octet-stream", None),
    ],
)
async def test_a_request_that_the_end_cuts_off_hears_so(
    path: str, start: bytes | None, sent: str | None
) -> None:
    begun = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if start is not None:
            head = {"status": 200, "headers": [(b"content-type", start)]}
            await send({"type": "http.response.start", **head})
        begun.set()
        await asyncio.Event().wait()

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    running = asyncio.create_task(AnswerCutOff(endless)(scope, begun.wait, send))
    await begun.wait()
    running.cancel()
    if sent is None:
        with pytest.raises(asyncio.CancelledError):
            await running
        return
    await running
    text = b"".join(message.get("body", b"") for message in messages).decode()
    assert "shutting_down" in text
    assert not messages[-1].get("more_body")
    if start is None:
        assert (messages[0]["status"], json.loads(text)["error"]["type"]) == (503, "server_error")
    else:
        assert sent in text


# After an error


async def test_a_body_that_is_too_long_is_refused_wherever_it_is_read(
    engine: FakeEngine, registry: Any, settings: Any, in_process: Any
) -> None:
    """Also by a middleware, outside of what answers errors."""
    app = create_app(engine, registry, settings)

    class Reads:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                await Request(scope, receive).body()
            await self.inner(scope, receive, send)

    app.user_middleware.append(type(app.user_middleware[0])(Reads))

    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 10_000

    async with in_process(app) as client:
        response = await client.post("/v1/chat/completions", content=endless(), headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/steering/vectors", "GET, POST"),
        ("/v1/steering/vectors/joy", "GET, DELETE"),
        ("/v1/steering/vectors/joy/tags/a", "PUT, DELETE"),
        ("/v1/steering/aliases/vectors/joy", "PUT, DELETE"),
        ("/v1/steering/profiles", "GET, POST"),
        ("/v1/jobs/a", "GET, DELETE"),
        ("/v1/chat/completions", "POST"),
    ],
)
async def test_a_wrong_method_is_told_all_the_right_ones(
    http: httpx.AsyncClient, path: str, allowed: str
) -> None:
    response = await http.patch(path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize(
    ("path", "kind", "size", "status"),
    [
        ("/v1/chat/completions", "application/json", 1, 400),
        ("/v1/chat/completions", "text/plain", 200_000, 415),
        ("/v1/chat/completions", "application/json", 3_000_000, 413),
        ("/v1/steering/vectors", "multipart/form-data", 200_000, 400),
        ("/v1/none", "application/json", 200_000, 404),
        ("/health", "application/json", 200_000, 405),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_connection_can_be_used_after_an_error(
    live: str, path: str, kind: str, size: int, status: int, chunked: bool
) -> None:
    address = live.removeprefix("http://")
    connection = http_client.HTTPConnection(address, timeout=LIVENESS_SECONDS)
    data = b"x" * size
    body: Any = iter([data[: size // 2], data[size // 2 :]]) if chunked else data
    connection.request("POST", path, body, {"content-type": kind}, encode_chunked=chunked)
    response = connection.getresponse()
    assert (response.status, "error" in json.loads(response.read())) == (status, True)
    held = connection.sock
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    assert connection.sock is held
    connection.close()
