"""The parts of Steer's endpoint plugin, without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from liveness import LIVENESS_SECONDS
from prometheus_client import CollectorRegistry, Gauge
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.sampling_params import RequestOutputKind

from steer.engines.base import PointReceipt, Receipt
from steer.engines.transformers.checkpoints.found import find_model
from steer.engines.transformers.checkpoints.known import DEMO
from steer.engines.vllm.core.admission import check_request
from steer.engines.vllm.front.ends import known_ends, model_ends
from steer.engines.vllm.front.twins import Twin, compared
from steer.engines.vllm.messages import put_on
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.errors import EngineError, SpecError, Unsupported
from steer.model import HookPoint
from steer.plan.selection import EVERYWHERE
from steer_server.generation.steering import Steering
from steer_server.metrics import Metrics
from steer_server.settings import ServerSettings
from steer_server.vllm import launch
from steer_server.vllm.answers import with_fields, with_receipt
from steer_server.vllm.fetching.receipt_fetcher import ReceiptFetcher
from steer_server.vllm.figures import Figures
from steer_server.vllm.ignored_field import RefuseIgnoredField
from steer_server.vllm.mounting import _stop_first, mount
from steer_server.vllm.pending_receipts import Count, PendingReceipts
from steer_server.vllm.plugin import SteerEndpoints
from steer_server.vllm.receipt_guard import ReceiptGuard
from steer_server.vllm.settings import settings_of

POINT = HookPoint(1, "resid_post")
TICKET = Ticket("key", fingerprint="print", plan="0" * 64, rows=1, selections=(EVERYWHERE,))
PROMPT = [5, 6, 7]


def made(fed: int) -> Receipt:
    return Receipt("print", fed, 0, 0, (PointReceipt(POINT, fed),))


class Workers:
    """Answers for one worker; counts the calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, dict[int, int]]]] = []
        self.fault: Exception | None = None
        self.forgets = False
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        """The first call has come; calls are answered."""
        self.answers.set()

    async def ask(self, asked: list[tuple[str, dict[int, int]]]) -> list[Any]:
        self.calls.append(asked)
        self.asked.set()
        await self.answers.wait()
        if self.fault is not None:
            raise self.fault
        if self.forgets:
            return [[{choice: {"error": "unknown"} for choice in fed} for _, fed in asked]]
        return [[{choice: made(n).as_json() for choice, n in fed.items()} for _, fed in asked]]

    async def ask_engines(self, asked: list[tuple[str, dict[int, int]]]) -> list[Any]:
        return [await self.ask(asked)]


# Receipts


async def test_receipts_asked_for_together_share_a_call() -> None:
    workers = Workers()
    calls = ReceiptFetcher(workers.ask_engines)
    calls.drop("left")
    found = await asyncio.gather(*(calls.fetch(f"k{n}", {0: n, 1: n + 1}) for n in range(5)))
    assert [one.tokens_steered for one in found[3]] == [3, 4]
    assert len(workers.calls) == 1
    assert workers.calls[0][-1] == ("left", {})
    await calls.fetch("again", {0: 1})
    assert workers.calls[1] == [("again", {0: 1})]


async def test_a_receipt_that_cannot_be_had_raises() -> None:
    workers = Workers()
    calls = ReceiptFetcher(workers.ask_engines)
    workers.fault = RuntimeError("gone")
    results = await asyncio.gather(
        calls.fetch("a", {0: 1}), calls.fetch("b", {0: 1}), return_exceptions=True
    )
    assert all(isinstance(one, EngineError) for one in results)
    workers.fault, workers.forgets = None, True
    with pytest.raises(EngineError, match="unknown"):
        await calls.fetch("c", {0: 1})
    workers.forgets = False
    assert (await calls.fetch("d", {0: 2}))[0].tokens_steered == 2


async def test_one_who_leaves_keeps_nobody_waiting() -> None:
    workers = Workers()
    workers.answers.clear()
    calls = ReceiptFetcher(workers.ask_engines)
    leaving = asyncio.create_task(calls.fetch("a", {0: 1}))
    staying = asyncio.create_task(calls.fetch("b", {0: 2}))
    await workers.asked.wait()
    assert workers.calls == [[("a", {0: 1}), ("b", {0: 2})]]
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    workers.answers.set()
    assert (await staying)[0].tokens_steered == 2


def output(
    *choices: tuple[int, int], finished: bool = False, prompt: Any = PROMPT, why: Any = None
) -> Any:
    made = [
        SimpleNamespace(index=index, token_ids=list(range(count)), finish_reason=why)
        for index, count in choices
    ]
    return SimpleNamespace(
        prompt_token_ids=prompt, outputs=made, finished=finished, kv_transfer_params=None
    )


def test_tokens_are_counted_by_delta_and_by_sum() -> None:
    delta = Count(delta=True)
    for one in (output((0, 1), (1, 1)), output((1, 2), prompt=None), output((0, 1))):
        delta.take(one)
    assert delta.fed == {0: 4, 1: 5}
    whole = Count(delta=False)
    for one in (output((0, 1)), output((0, 3)), output((0, 4))):
        whole.take(one)
    assert whole.fed == {0: 6}
    assert whole.prompt == tuple(PROMPT)


# The guard


class Client:
    """vLLM's client, as far as the guard knows it."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs
        self.workers = Workers()
        self.seen: list[Any] = []
        self.closed = 0
        self.emptied = 0

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **named: Any
    ) -> AsyncGenerator[Any, None]:
        self.seen.append(sampling_params.extra_args)
        try:
            for one in self.outputs:
                yield one
        finally:
            self.closed += 1

    async def reset_prefix_cache(self) -> bool:
        self.emptied += 1
        return True

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        assert method == "steer_receipts"
        return await self.workers.ask(*args)


def watched(client: Client, fields: Any = None) -> ReceiptGuard:
    return ReceiptGuard(client, Metrics(name_limit=5), fields or (lambda text: 1 / 0))


def params(extra: Any = None, n: int = 1) -> SamplingParams:
    return SamplingParams(n=n, output_kind=RequestOutputKind.DELTA, extra_args=extra)


async def test_a_plain_request_passes_as_it_is() -> None:
    client = Client(output((0, 1), finished=True))
    original = client.generate
    watched(client)
    assert client.generate != original
    for extra in (None, {"other": 1}):
        plain = params(extra)
        assert [one async for one in client.generate("p", plain, "id")] == list(client.outputs)
        assert client.seen[-1] is plain.extra_args
    assert not client.workers.calls


async def test_where_all_are_watched_nothing_passes_that_is_not() -> None:
    client = Client(output((0, 1), finished=True))
    guard = ReceiptGuard(client, Metrics(name_limit=5), lambda text: 1 / 0, watches_all=True)
    for extra in (None, {"other": 1}, {"steering": "{}"}):
        with pytest.raises(VLLMValidationError, match="armed on every request"):
            client.generate("p", params(extra), "id")
    assert not client.seen
    pending = guard.expect(TICKET)
    found = client.generate("p", params(pending.extra_args), "id")
    assert [one async for one in found] == list(client.outputs)


class HangingClient:
    """A client whose requests never end; knows what its workers were asked."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.closed = False
        self.asked: list[tuple[str, Any]] = []

    async def generate(self, *_: Any, **named: Any) -> AsyncGenerator[Any, None]:
        self.begun.set()
        try:
            await asyncio.Event().wait()
            yield named
        finally:
            self.closed = True

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.asked.append((method, *args))
        return [[{}]]


async def test_of_a_twin_that_nobody_waits_for_nothing_is_left() -> None:
    client = HangingClient()
    capture = Ticket("twins-key", capture=CaptureOrder((POINT,), (2, 3)))
    twin = Twin("key", 0, tuple(PROMPT), (8, 9), capture)
    waiting = asyncio.create_task(compared(client, client.generate, twin))
    await client.begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert client.closed
    assert client.asked == [("steer_captured", ["twins-key"])]


@pytest.mark.parametrize(
    ("asked", "ends"),
    [({}, [7, 9]), ({"stop_token_ids": [9, 3]}, [9, 3, 7]), ({"ignore_eos": True}, [])],
)
async def test_what_ends_an_answer_is_told_to_vllm(asked: dict[str, Any], ends: list[int]) -> None:
    """On every route, steered or not, and once for requests that share their parameters."""
    client = Client(output((0, 1), finished=True))
    ReceiptGuard(client, Metrics(name_limit=5), lambda text: 1 / 0, frozenset([7, 9]))
    plain = SamplingParams(**asked)
    for _ in range(2):
        assert [one async for one in client.generate("p", plain, "id")]
        assert plain.stop_token_ids == ends
        assert plain.all_stop_token_ids == set(ends)


@pytest.mark.parametrize(
    ("generation", "config", "known", "all_ends"),
    [
        ({"eos_token_id": [2, 5]}, 2, {2, 4, 5}, {2, 4, 5}),
        ({"eos_token_id": 5}, 2, {4, 5}, {4, 5}),
        ({}, [2], {4}, {2, 4}),
    ],
)
def test_the_ends_that_vllm_does_not_know(
    generation: Any, config: Any, known: set[int], all_ends: set[int]
) -> None:
    model = SimpleNamespace(
        try_get_generation_config=lambda: generation,
        hf_text_config=SimpleNamespace(eos_token_id=config),
    )
    found: Any = SimpleNamespace(model_config=model)
    tokenizer = SimpleNamespace(eos_token_id=4)
    assert known_ends(found, tokenizer) == known
    assert model_ends(found, tokenizer) == all_ends


async def test_prompts_of_one_claim_have_keys_of_their_own() -> None:
    client = Client(output((0, 2), (1, 1)), output((0, 1), (1, 4), finished=True, prompt=None))
    guard = watched(client)
    pending = guard.expect(TICKET)
    streams = [client.generate("p", params(TICKET.as_extra_args(), n=2), "id") for _ in range(2)]
    assert not pending.complete
    for stream in streams:
        async for one in stream:
            assert pending.complete == (one.finished and stream is streams[1])
    tickets = [Ticket.of(extra) for extra in client.seen]
    assert len({ticket.key for ticket in tickets if ticket} | {TICKET.key}) == 3
    assert {ticket.n for ticket in tickets if ticket} == {2}
    assert [one.tokens_steered for one in pending.receipts] == [5, 7, 5, 7]
    assert pending.prompts == {0: tuple(PROMPT), 1: tuple(PROMPT)}


@pytest.mark.parametrize(
    ("fed", "code"), [(4, None), (5, None), (4, "not_finite"), (4, "not_steered")]
)
async def test_a_receipt_that_comes_with_the_last_output_is_not_asked_for(
    fed: int, code: str | None
) -> None:
    """One about other tokens than the answer's is none."""
    last = output((0, 1), finished=True)
    answer = made(fed).as_json() if code is None else {"error": "why", "code": code}
    put_on(last, fed, answer)
    client = Client(output((0, 1)), last)
    pending = watched(client).expect(TICKET)
    stream = client.generate("p", params(TICKET.as_extra_args()), "id")
    await anext(stream)
    if code is None:
        assert await anext(stream) is last
        assert last.kv_transfer_params is None
        assert [one.tokens_steered for one in pending.receipts] == [4]
        assert len(client.workers.calls) == (fed != 4)
    else:
        with pytest.raises((VLLMValidationError, EngineError), match="why"):
            await anext(stream)
        assert not client.workers.calls
        assert client.emptied == (code == "not_steered")
        assert not pending.complete


async def test_without_a_receipt_the_end_is_withheld() -> None:
    client = Client(output((0, 1)), output((0, 1), finished=True))
    client.workers.forgets = True
    guard = watched(client)
    pending = guard.expect(TICKET)
    stream = client.generate("p", params(TICKET.as_extra_args()), "id")
    assert await anext(stream) is client.outputs[0]
    with pytest.raises(EngineError):
        await anext(stream)
    assert not pending.complete
    assert client.closed == 1


async def test_a_reader_that_stops_ends_the_request_and_leaves_nothing() -> None:
    client = Client(output((0, 1)), output((0, 1), finished=True))
    guard = watched(client)
    pending = guard.expect(TICKET)
    stream = client.generate("p", params(TICKET.as_extra_args()), "id")
    await anext(stream)
    await stream.aclose()
    assert client.closed == 1
    assert not client.workers.calls
    other = Ticket("other", fingerprint="print", plan="0" * 64)
    second = guard.expect(other)
    async for _ in client.generate("p", params(other.as_extra_args()), "id"):
        pass
    assert second.complete
    first = Ticket.of(client.seen[0])
    assert first is not None
    assert client.workers.calls[0][-1] == (first.key, {})
    assert not pending.complete


async def test_a_ticket_is_good_only_while_somebody_waits_for_it() -> None:
    client = Client(output((0, 1), finished=True))
    guard = watched(client)
    with pytest.raises(VLLMValidationError, match="only the server itself"):
        client.generate("p", params(TICKET.as_extra_args()), "id")
    pending = guard.expect(TICKET)
    changed = Ticket("key", fingerprint="print", plan="1" * 64, rows=1, selections=(EVERYWHERE,))
    with pytest.raises(VLLMValidationError):
        client.generate("p", params(changed.as_extra_args()), "id")
    with pytest.raises(VLLMValidationError, match="only the server itself"):
        client.generate("p", params({"steer": "{"}), "id")
    assert client.generate("p", params(TICKET.as_extra_args()), "id") is not None
    del pending
    with pytest.raises(VLLMValidationError):
        client.generate("p", params(TICKET.as_extra_args()), "id")
    assert not client.seen


async def test_a_spec_in_the_arguments_becomes_a_ticket() -> None:
    client = Client(output((0, 3), finished=True))
    texts: list[str] = []

    async def fields(text: str) -> tuple[Steering, Ticket]:
        texts.append(text)
        if text == "bad":
            raise SpecError("no such thing", param="/vllm_xargs/steering")
        return Steering(), TICKET

    watched(client, fields)
    extra = {"steering": "{}", "other": 1}
    async for _ in client.generate("p", params(extra), "id"):
        pass
    assert texts == ["{}"]
    assert set(client.seen[0]) == {"steer", "other"}
    assert client.workers.calls[0][0][1] == {0: 5}
    with pytest.raises(VLLMValidationError, match="no such thing"):
        await anext(client.generate("p", params({"steering": "bad"}), "id"))


def test_a_spec_that_came_past_the_watch_is_refused_by_the_engine() -> None:
    unread = SimpleNamespace(pooling_params=None, sampling_params=params({"steering": "{}"}))
    with pytest.raises(SpecError, match="nobody has compiled"):
        check_request(unread, None)


# Responses


def claimed(*receipts: Receipt) -> PendingReceipts:
    pending = PendingReceipts(TICKET)
    pending.begin()
    if receipts:
        pending.close(0, list(receipts))
    return pending


async def streamed(pending: PendingReceipts, *parts: Any) -> list[str]:
    """`parts` are events, or functions to call between them."""

    async def events() -> AsyncGenerator[str, None]:
        for part in parts:
            if callable(part):
                part()
            else:
                yield part

    stream = with_receipt(events(), pending, Steering(), Metrics(name_limit=5))
    return [event async for event in stream]


def data(**content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


DONE = "data: [DONE]\n\n"


async def test_only_what_may_be_last_is_held_back() -> None:
    pending = claimed()
    fields: list[str] = []

    async def events() -> AsyncGenerator[str, None]:
        for number in range(3):
            fields.append(f"made {number}")
            yield data(n=number)
        pending.close(0, [made(4)])
        yield data(n=3)
        yield ": keep-alive\n\n"
        yield data(n=4)
        yield DONE

    got = []
    async for event in with_receipt(events(), pending, Steering(), Metrics(name_limit=5)):
        fields.append("sent")
        got.append(event)
    assert fields == ["made 0", "sent", "made 1", "sent", "made 2", *["sent"] * 5]
    assert got[:3] == [data(n=0), data(n=1), data(n=2)]
    assert got[3:5] == [": keep-alive\n\n", data(n=3)]
    last = json.loads(got[5].removeprefix("data: "))
    assert last == {"n": 4, "steering": made(4).as_json()}
    assert got[6:] == [DONE]


async def test_a_stream_without_a_receipt_ends_in_an_error() -> None:
    got = await streamed(claimed(), data(n=0), DONE)
    error = json.loads(got[1].removeprefix("data: "))["error"]
    assert error["code"] == "not_steered"
    assert got[2] == DONE


async def test_an_error_of_vllm_is_passed_on_alone() -> None:
    pending = claimed()
    wrong = data(error={"message": "broken"})
    end = lambda: pending.close(0, [made(4)])  # noqa: E731
    assert await streamed(pending, data(n=0), wrong, DONE) == [data(n=0), wrong, DONE]
    pending = claimed()
    assert await streamed(pending, end, data(n=0), wrong, DONE) == [data(n=0), wrong, DONE]


def test_a_whole_response_keeps_its_headers() -> None:
    response = JSONResponse({"a": "é"}, headers={"x-load": "1"})
    changed = with_fields(response, {"steering": {"b": 1}})
    assert json.loads(bytes(changed.body)) == {"a": "é", "steering": {"b": 1}}
    assert changed.headers["content-length"] == str(len(changed.body))
    assert changed.headers["x-load"] == "1"


# The application


async def call(app: FastAPI, method: str, path: str, **named: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.request(method, path, **named)


async def test_our_routes_come_before_those_they_replace() -> None:
    app, ours = FastAPI(), APIRouter()

    @app.post("/v1/chat/completions")
    @app.get("/v1/models")
    @app.get("/health")
    def theirs() -> str:
        return "theirs"

    @ours.post("/v1/chat/completions")
    @ours.get("/v1/new")
    def mine() -> str:
        return "ours"

    mount(app, ours)
    expected = {"/v1/models": "theirs", "/health": "theirs", "/v1/new": "ours"}
    for path, answer in expected.items():
        assert (await call(app, "GET", path)).json() == answer
    assert (await call(app, "POST", "/v1/chat/completions")).json() == "ours"
    assert app.openapi()["paths"]["/v1/chat/completions"]["post"]["summary"] == "Mine"


def test_vllm_knows_the_plugin_and_a_key_guards_all_of_it() -> None:
    plugin = SteerEndpoints()
    assert isinstance(plugin, EndpointPlugin)
    app = FastAPI(openapi_url=None)
    plugin.attach_router(app)
    paths = [getattr(route, "path", "") for route in app.routes]
    assert len(paths) > 20
    assert all(path.startswith("/v1/") for path in paths)


async def test_a_field_that_nobody_hears_is_refused() -> None:
    app = FastAPI()

    @app.post("/v1/messages")
    @app.post("/v1/responses")
    @app.post("/tokenize")
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return body

    app.add_middleware(RefuseIgnoredField)
    asking = {"input": "x", "steering": {"interventions": []}}
    refused = await call(app, "POST", "/v1/messages", json=asking)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "/steering"
    assert "vllm_xargs" in refused.json()["error"]["message"]
    for name, value in (
        ("detectors", [{"name": "rude"}]),
        ("inspect", {"kl": True}),
        ("steering_spec", {}),
        ("extra_body", {"steering": {}}),
    ):
        refused = await call(app, "POST", "/v1/messages", json={"input": "x", name: value})
        assert refused.status_code == 400, name
        assert refused.json()["error"]["param"].startswith(f"/{name}")
    # Only routes that take a spec in that form are told to be sent one.
    refused = await call(app, "POST", "/v1/embeddings", json=asking)
    assert "vllm_xargs" not in refused.json()["error"]["message"]
    for path, body in (
        ("/v1/messages", {"input": 'the word "steering"'}),
        ("/v1/messages", {"input": "x", "steering": None}),
        ("/v1/responses", asking),
        ("/tokenize", asking),
    ):
        assert (await call(app, "POST", path, json=body)).json() == body


# Metrics and settings


async def test_figures_do_not_wait_on_the_event_loop() -> None:
    own = CollectorRegistry()
    loop = asyncio.get_running_loop()
    gauge = Gauge("steer_test", "A figure that needs the loop", registry=own)

    async def figure() -> float:
        return 7.0

    gauge.set_function(
        lambda: asyncio.run_coroutine_threadsafe(figure(), loop).result(LIVENESS_SECONDS)
    )
    figures = Figures(own)
    assert not list(figures.collect())
    found = await asyncio.to_thread(lambda: list(figures.collect()))
    assert found[0].samples[0].value == 7.0
    assert next(figures.collect()).samples[0].value == 7.0


def test_settings_come_from_the_environment() -> None:
    found = settings_of(
        {
            "STEER_REGISTRY": "/r",
            "STEER_ALLOW_INLINE_VECTORS": "false",
            "STEER_MAX_UPLOAD_BYTES": "5",
        },
        model="m",
        served_name="s",
    )
    assert (found.registry, found.allow_inline_vectors, found.max_upload_bytes) == ("/r", False, 5)
    with pytest.raises(SpecError, match=r"STEER_MEASURED_SHARE='2'"):
        settings_of({"STEER_MEASURED_SHARE": "2"}, model="m", served_name="s")


def test_the_command_becomes_vllms_server() -> None:
    options = {"max_model_len": "256", "enforce_eager": "true", "enable-prefix-caching": "false"}
    settings = ServerSettings(
        engine="vllm",
        port=81,
        registry="here",
        engine_options=options,
        allow_inline_vectors=False,
        api_key="secret",
    )
    flags = launch.flags(settings, find_model("steer-demo"))
    assert flags[:2] == ["--model", str(DEMO.shipped / "model")]
    assert flags[flags.index("--served-model-name") + 1] == "steer-demo"
    assert flags[-4:] == ["--max-model-len", "256", "--enforce-eager", "--no-enable-prefix-caching"]
    found = launch.environment(settings, {"VLLM_PLUGINS": "other", "PATH": "p"})
    assert found["VLLM_PLUGINS"] == "other,steer"
    assert found["STEER_REGISTRY"] == str(Path("here").absolute())
    assert found["STEER_ALLOW_INLINE_VECTORS"] == "False"
    assert found["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(flags)
    with pytest.raises(SpecError, match="--port"):
        launch.flags(ServerSettings(engine_options={"port": "1"}), find_model("steer-demo"))


def test_without_vllm_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="steer-llm"):
        launch.launch(ServerSettings(engine="vllm"))


async def test_a_request_that_was_not_steered_empties_the_prefix_cache() -> None:
    emptied = []

    async def ask(asked: list[tuple[str, dict[int, int]]]) -> list[Any]:
        return [[[{0: {"error": "its plan could not be read", "code": "not_steered"}}]]]

    async def cleanse() -> None:
        emptied.append(True)

    with pytest.raises(EngineError, match="its plan could not be read"):
        await ReceiptFetcher(ask, cleanse).fetch("key", {0: 7})
    assert emptied == [True]


def test_jobs_are_stopped_before_the_engine_is() -> None:
    order: list[Any] = []
    jobs = SimpleNamespace(stop=lambda patience: order.append(("jobs", patience > 0)))
    client = SimpleNamespace(shutdown=lambda timeout: order.append(("engine", timeout)))
    _stop_first(client, jobs)
    client.shutdown(timeout=LIVENESS_SECONDS)
    assert order == [("jobs", True), ("engine", LIVENESS_SECONDS)]
