"""From a request to its plan and ticket: what is known is found without a thread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anyio import to_thread

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.detector import Detector
from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.errors import SteerError, Unsupported
from steer.model import Capabilities, ModelInfo
from steer.plan.cache import PlanCache
from steer.registry.blobs.plan_store import PlanStore
from steer.registry.profiles import Profile
from steer.registry.registry import Registry
from steer.spec import KINDS, parse_spec
from steer_server.generation import kept_specs
from steer_server.http.json_body import SMALL
from steer_server.settings import ServerSettings
from steer_server.vllm.listing import keep_apart
from steer_server.vllm.steer_fields import (
    SteerFields,
    concerns,
    planned,
    planned_text,
    take_fields,
)

INFO = ModelInfo("tiny", "LlamaForCausalLM", 4, 16, 64, 128)
SPEC = {"interventions": [{"kind": "add", "vector": "v", "layers": [1]}]}
MODELS = SimpleNamespace(
    is_base_model=lambda name: name == "tiny",
    lora_requests={"french-lora": None, "org:other": None},
)


def asked(**fields: Any) -> Any:
    """One of vLLM's requests, as far as Steer looks at it."""
    base = {"model": "tiny", "stream": False, "use_beam_search": False, "vllm_xargs": None}
    base["background"] = False
    own = {name: fields.pop(name) for name in base.keys() & fields.keys()}
    return SimpleNamespace(**{**base, **own}, model_extra=fields)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Any]:
    with Registry.open(tmp_path) as registry:
        registry.add("v", ControlVector.of({1: torch.ones(16)}))
        registry.put_profile(Profile(name="calm", spec=parse_spec(SPEC)))
        yield SimpleNamespace(
            registry=registry,
            model_name="tiny",
            plans=PlanCache(registry, INFO, Capabilities("vllm", KINDS, INFO.sites)),
            settings=ServerSettings(measured_share=0),
        )


@pytest.fixture
def issuer(tmp_path: Path) -> TicketIssuer:
    return TicketIssuer(PlanStore(tmp_path))


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to worker threads."""
    seen: list[Any] = []
    run = to_thread.run_sync

    async def run_sync(work: Callable[..., Any], *args: Any) -> Any:
        seen.append(work)
        return await run(work, *args)

    monkeypatch.setattr(to_thread, "run_sync", run_sync)
    return seen


async def fields_of(serving: Any, issuer: TicketIssuer, request: Any, size: int = 1) -> SteerFields:
    return await planned(serving, issuer, lambda: take_fields(serving, request, MODELS), size)


async def test_where_all_are_watched_one_that_asks_for_nothing_has_a_ticket(
    serving: Any, issuer: TicketIssuer
) -> None:
    serving.engine = SimpleNamespace(
        info=INFO, capabilities=Capabilities("vllm", KINDS, INFO.sites, captures=INFO.sites)
    )
    assert (await fields_of(serving, issuer, asked())).ticket is None
    serving.settings = ServerSettings(measured_share=0, detectors=("rude:stop",))
    with pytest.raises(SteerError, match="rude"):
        await fields_of(serving, issuer, asked())
    serving.registry.add("rude", Detector.of(torch.ones(16), layer=1))
    found = await fields_of(serving, issuer, asked())
    assert found.ticket is not None
    assert [one.spec.name for one in found.watch.armed] == ["rude"]
    assert not found.ticket.attached
    with pytest.raises(Unsupported, match="a beam search"):
        await fields_of(serving, issuer, asked(use_beam_search=True))
    several = asked()
    several.n = 2
    with pytest.raises(Unsupported, match="'n' asks for 2"):
        await fields_of(serving, issuer, several)


async def test_a_new_spec_takes_one_thread_and_a_known_one_none(
    serving: Any, issuer: TicketIssuer, hops: list[Any]
) -> None:
    first = await fields_of(serving, issuer, asked(steering=SPEC))
    assert len(hops) == 1
    hops.clear()
    again = await fields_of(serving, issuer, asked(steering=SPEC))
    text = await planned_text(serving, issuer, json.dumps(SPEC))
    assert hops == []
    for steering, ticket in ((again.steering, again.ticket), text):
        assert steering.plan is first.steering.plan
        assert ticket is not None
        assert ticket.plan == first.ticket.plan  # type: ignore[union-attr]
        assert ticket.key != first.ticket.key  # type: ignore[union-attr]
    serving.registry.add("v", ControlVector.of({1: -torch.ones(16)}))
    changed = await fields_of(serving, issuer, asked(steering=SPEC))
    assert len(hops) == 1
    assert changed.ticket.plan != first.ticket.plan  # type: ignore[union-attr]


async def test_a_plan_that_is_not_in_the_store_is_written_by_a_thread(
    serving: Any, issuer: TicketIssuer, hops: list[Any]
) -> None:
    serving.plans.plan(parse_spec(SPEC))
    await fields_of(serving, issuer, asked(steering=SPEC))
    assert len(hops) == 1


@pytest.mark.parametrize(
    ("request_", "size", "threads"),
    [
        (asked(receipt="full"), 1, 0),
        (asked(inspect={"kind": "logit_lens"}), 1, 0),
        (asked(model="other"), 1, 0),
        (asked(model="tiny:calm"), 1, 1),
        (asked(steering=SPEC), SMALL + 1, 1),
    ],
    ids=["nothing steered", "read", "vLLM's own", "a profile", "long"],
)
async def test_threads_are_for_what_may_wait(
    serving: Any, issuer: TicketIssuer, hops: list[Any], request_: Any, size: int, threads: int
) -> None:
    await fields_of(serving, issuer, asked(steering=SPEC))
    hops.clear()
    fields = await fields_of(serving, issuer, request_, size)
    assert len(hops) == threads
    assert (fields.ticket is None) == (fields.steering.plan is None and not fields.added.inspect)


async def test_who_asks_for_it_is_measured_and_a_share_of_the_others(
    serving: Any, issuer: TicketIssuer
) -> None:
    async def measured(**fields: Any) -> bool:
        found = await fields_of(serving, issuer, asked(steering=SPEC, **fields))
        assert found.ticket is not None
        return found.ticket.measure

    assert not await measured()
    assert await measured(receipt="full")
    serving.settings = ServerSettings(measured_share=1)
    assert await measured()


@pytest.mark.parametrize("known", [False, True])
async def test_what_is_wrong_is_wrong_however_it_is_read(
    serving: Any, issuer: TicketIssuer, known: bool
) -> None:
    if known:
        await fields_of(serving, issuer, asked(steering=SPEC))
    wrong = {"interventions": [{"kind": "add", "vector": "v", "layers": [9]}]}
    for fields, code, param in (
        ({"steering": wrong}, "layer_out_of_range", "/steering/interventions/0/layers"),
        ({"steering": SPEC, "model": "tiny:calm"}, "steering_conflict", "/steering"),
        ({"steering": SPEC, "use_beam_search": True}, "unsupported_parameter", "/use_beam_search"),
        ({"steering": SPEC, "background": True}, "unsupported_parameter", "/background"),
        ({"compare": True}, "nothing_to_compare", "/compare"),
        (
            {"inspect": {"layers": [1]}, "model": "french-lora"},
            "unsupported_parameter",
            "/inspect",
        ),
    ):
        with pytest.raises(SteerError) as caught:
            await fields_of(serving, issuer, asked(**fields))  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.param) == (code, param)


async def test_a_spec_that_was_sent_before_is_not_parsed_again(
    serving: Any, issuer: TicketIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_specs._parsed.cache_clear()
    parsed: list[Any] = []

    def parse(value: Any, *, at: str) -> Any:
        parsed.append(at)
        return parse_spec(value, at=at)

    monkeypatch.setattr(kept_specs, "parse_spec", parse)
    for _ in range(3):
        await fields_of(serving, issuer, asked(steering=SPEC))
        with pytest.raises(SteerError, match="at least 1"):
            await fields_of(serving, issuer, asked(steering={"interventions": []}))
    assert parsed.count("/steering") == 1 + 3  # one that is wrong is looked at every time


# Adapters


@pytest.mark.parametrize("model", ["french-lora", "org:other", "tiny"])
async def test_adapters_are_steered_by_specs_and_by_profiles(
    serving: Any, issuer: TicketIssuer, model: str
) -> None:
    by_spec = await fields_of(serving, issuer, asked(model=model, steering=SPEC))
    by_profile = await fields_of(serving, issuer, asked(model=f"{model}:calm"))
    for found in (by_spec, by_profile):
        assert found.model == model
        assert found.ticket is not None
    assert by_spec.ticket.fingerprint == by_profile.ticket.fingerprint  # type: ignore[union-attr]


class Models:
    """vLLM's models, of which `tiny` is one."""

    def __init__(self, *adapters: str) -> None:
        self.lora_requests = dict.fromkeys(adapters)

    def is_base_model(self, name: str) -> bool:
        return name == "tiny"

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> str:
        self.lora_requests[request.lora_name] = None
        return "loaded"


@pytest.mark.parametrize("adapters", [("tiny:calm",), ("one", "one:calm")], ids=str)
def test_an_adapter_that_has_a_profiles_name_stops_the_start(adapters: tuple[str, ...]) -> None:
    with pytest.raises(Unsupported, match=r"name of (the|a) profile") as refused:
        keep_apart(Models(*adapters))
    assert refused.value.code == "adapter_name"


async def test_an_adapter_that_would_have_a_profiles_name_is_not_loaded() -> None:
    models = Models("one", "later:calm")
    keep_apart(models)
    for name, said in (
        ("tiny:calm", "the profile 'calm' of the model 'tiny'"),
        ("one:calm", "the profile 'calm' of the model 'one'"),
        ("later", "'later:calm', which is loaded"),
    ):
        answer: Any = await models.load_lora_adapter(SimpleNamespace(lora_name=name))
        assert said in answer.error.message
        assert answer.error.code == 400
        assert name not in models.lora_requests
    for name in ("two", "org:two"):
        assert await models.load_lora_adapter(SimpleNamespace(lora_name=name)) == "loaded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"steer": SPEC}, "/steer"),
        ({"sterring": SPEC}, "/sterring"),
        ({"steer_vector_request": {"name": "v"}}, "/steer_vector_request"),
        ({"interventions": SPEC["interventions"]}, "/interventions"),
        ({"steering": SPEC, "detector": [{"name": "rude"}]}, "/detector"),
        ({"extra_body": {"steering": SPEC}}, "/extra_body/steering"),
        ({"extra_args": {"detectors": []}}, "/extra_args/detectors"),
        ({"vllm_xargs": {"detectors": "[]"}}, "/vllm_xargs/detectors"),
        ({"vllm_xargs": {"steering": json.dumps(SPEC), "inspect": "{}"}}, "/vllm_xargs/inspect"),
        ({"vllm_xargs": {"stearing": json.dumps(SPEC)}}, "/vllm_xargs/stearing"),
    ],
)
def test_what_vllm_would_leave_aside_is_refused_where_it_means_steer(
    serving: Any, fields: dict[str, Any], param: str
) -> None:
    assert concerns(asked(**fields), MODELS)
    with pytest.raises(SteerError) as caught:
        take_fields(serving, asked(**fields), MODELS)
    assert (caught.value.code, caught.value.param) == ("unknown_field", param)


@pytest.mark.parametrize(
    "fields",
    [
        {"user_field": 1, "extra_body": {"top_k": 1}, "extra_args": None},
        {"vllm_xargs": {"my_processor": "x"}},
    ],
)
def test_other_fields_that_vllm_does_not_know_stay_vllms(fields: dict[str, Any]) -> None:
    assert not concerns(asked(**fields), MODELS)
    assert concerns(asked(**fields), MODELS, watches_all=True)
