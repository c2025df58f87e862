"""What becomes of tickets that cannot be honoured: their request fails, the engine goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from vllm import LLM, PoolingParams, SamplingParams
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

from steer.engines.vllm.core.admission import check_request, check_tickets
from steer.engines.vllm.core.cache_keys import fork_block_keys
from steer.engines.vllm.ticket import _VERSION, CaptureOrder, Ticket
from steer.errors import SpecError, SteerError, TooLarge, UnknownArtefact, Unsupported
from steer.model import HookPoint
from steer.plan.selection import EVERYWHERE, Selection
from steer.prompts.roles import RoleRanges

ROWS = 8
PROMPT = list(range(3, 13))
POINT = HookPoint(1, "resid_post")
MISSING = "f" * 64


def steering(**fields) -> Ticket:
    given = {"fingerprint": "one", "plan": "0" * 64, "rows": 1, "selections": (EVERYWHERE,)}
    return Ticket("key", **{**given, **fields})


def examine(ticket: Ticket, config: object) -> None:
    if ticket.plan == MISSING:
        raise UnknownArtefact(f"the plan {ticket.plan!r} is not in the plan store")


@pytest.fixture(scope="module")
def llm():
    fork_block_keys()
    check_tickets(examine)
    return LLM(
        "vectors/demo/model",
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=256,
        gpu_memory_utilization=0.3,
        async_scheduling=False,
        enable_prompt_embeds=True,
        scheduler_cls="steer.engines.vllm.core.scheduler.SteerScheduler",
        additional_config={"steer": {"edit_rows": ROWS}},
    )


@pytest.fixture
def core(llm):
    return llm.llm_engine.engine_core.engine_core


@pytest.fixture
def config(llm):
    return copy.copy(llm.llm_engine.vllm_config)


def params(ticket: Ticket | str | None = None, **fields) -> SamplingParams:
    extra = {"steer": ticket} if isinstance(ticket, str) else ticket and ticket.as_extra_args()
    return SamplingParams(max_tokens=4, ignore_eos=True, extra_args=extra, **fields)


def request(ticket: Ticket | str | None = None, **fields) -> EngineCoreRequest:
    given = {
        "request_id": "id",
        "prompt_token_ids": PROMPT,
        "mm_features": None,
        "sampling_params": params(ticket),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**{**given, **fields})


def generate(llm, sampling, prompt=None):
    prompt = {"prompt_token_ids": PROMPT} if prompt is None else prompt
    return llm.generate([prompt], sampling, use_tqdm=False)[0]


BAD = {
    "no ticket": ("{}", "not a ticket"),
    "no json": ("steer me", "not a ticket"),
    "no text": ("[1]", "not a ticket"),
    "no steering": (f'{{"v":{_VERSION},"key":"a","n":1,"steering":{{}}}}', "not a ticket"),
    "another version": ('{"v":99,"key":"a","n":1}', "version 99"),
    "no choices": (steering(n=0), "n is 0"),
    "negative rows": (steering(rows=-1), "-1 edit rows"),
    "no fingerprint": (steering(fingerprint=""), "no fingerprint"),
    "no plan": (
        f'{{"v":{_VERSION},"key":"a","n":1,"steering":"{{\\"selections\\":[{{}}]}}"}}',
        "names no plan",
    ),
    "too many rows": (steering(rows=ROWS + 1), "needs 9 edit rows and the engine has 8"),
    "unknown plan": (steering(plan=MISSING), "not in the plan store"),
    "position": (Ticket("key", capture=CaptureOrder((POINT,), (10,))), "position 10 is not in"),
    "before": (Ticket("key", capture=CaptureOrder((POINT,), (-1,))), "position -1 is not in"),
}


@pytest.mark.parametrize(("ticket", "sentence"), BAD.values(), ids=BAD)
def test_the_front_end_refuses_with_vllms_error_and_goes_on(llm, ticket, sentence):
    with pytest.raises(VLLMValidationError, match=sentence) as caught:
        generate(llm, params(ticket))
    assert isinstance(caught.value.__cause__, SteerError)
    assert caught.value.parameter in {"extra_args.steer", "/interventions"}
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(generate(llm, params()).outputs[0].token_ids) == 4


@pytest.mark.parametrize(("ticket", "sentence"), BAD.values(), ids=BAD)
def test_the_engine_core_refuses_what_a_front_end_let_through(core, ticket, sentence):
    with pytest.raises(SteerError, match=sentence):
        core.preprocess_add_request(request(ticket))
    made, _ = core.preprocess_add_request(request(steering()))
    assert made.sampling_params.extra_args is not None


def test_one_bad_request_of_many_leaves_no_trace(llm):
    prompts = [{"prompt_token_ids": PROMPT}] * 3
    with pytest.raises(VLLMValidationError):
        llm.generate(prompts, [params(), params("{}"), params()], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(llm.generate(prompts, params(), use_tqdm=False)) == 3


def test_good_tickets_pass(llm):
    capture = CaptureOrder((POINT,), (0, 9))
    for ticket in (steering(), steering(rows=ROWS, capture=capture), Ticket("k", capture=capture)):
        assert len(generate(llm, params(ticket)).outputs[0].token_ids) == 4


def test_requests_wait_for_rows_under_the_synchronous_scheduler_as_well(llm, core):
    tickets = [steering(fingerprint=f"f{number}", rows=3) for number in range(7)]
    prompts = [{"prompt_token_ids": PROMPT}] * len(tickets)
    outputs = llm.generate(prompts, [params(one) for one in tickets], use_tqdm=False)
    assert [len(one.outputs[0].token_ids) for one in outputs] == [4] * 7
    assert (core.scheduler.edit_rows.capacity, core.scheduler.edit_rows.used) == (ROWS, 0)


def test_requests_without_tickets_are_left_alone(llm, config):
    config.additional_config = {}
    for extra in (None, {}, {"other": 1}):
        sampling = SamplingParams(max_tokens=1, extra_args=extra)
        check_request(request(sampling_params=sampling), config)
        assert sampling.skip_reading_prefix_cache is False


def test_embeddings_are_refused(llm):
    embeds = {"prompt_embeds": torch.zeros(4, llm.llm_engine.model_config.get_hidden_size())}
    with pytest.raises(VLLMValidationError, match="a prompt of embeddings"):
        generate(llm, params(steering()), embeds)
    assert len(generate(llm, params(), embeds).outputs[0].token_ids) == 4


def test_streaming_input_is_refused(config):
    with pytest.raises(Unsupported, match="arrives in pieces"):
        check_request(request(steering(), resumable=True), config)


def test_pooling_is_refused(config):
    pooling = PoolingParams(extra_kwargs={"steer": "{}"})
    with pytest.raises(Unsupported, match="pooling requests"):
        check_request(request(sampling_params=None, pooling_params=pooling), config)
    check_request(request(sampling_params=None, pooling_params=PoolingParams()), config)


@pytest.mark.parametrize("additional", [{}, None])
def test_an_engine_without_steer_refuses(config, additional):
    config.additional_config = additional
    with pytest.raises(Unsupported, match="without Steer"):
        check_request(request(steering()), config)


@pytest.mark.parametrize("name", [None, "vllm.v1.core.sched.scheduler.Scheduler"])
def test_an_engine_that_does_not_wait_for_rows_refuses(config, name):
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.scheduler_cls = name
    with pytest.raises(Unsupported, match="does not wait for edit rows"):
        check_request(request(steering()), config)


@pytest.mark.parametrize(
    ("name", "inner", "refused"),
    [
        ("OffloadingConnector", (), None),
        ("SimpleCPUOffloadConnector", (), None),
        ("LMCacheConnectorV1", (), "LMCacheConnectorV1"),
        ("MultiConnector", ("OffloadingConnector",), None),
        ("MultiConnector", ("OffloadingConnector", "NixlConnector"), "NixlConnector"),
    ],
)
def test_a_connector_with_keys_of_its_own_is_refused_by_name(config, name, inner, refused):
    config.kv_transfer_config = KVTransferConfig(
        kv_connector=name,
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": [{"kv_connector": one} for one in inner]},
    )
    if refused is None:
        check_request(request(steering()), config)
    else:
        with pytest.raises(Unsupported, match=refused):
            check_request(request(steering()), config)


def test_a_request_that_captures_does_not_read_the_cache(llm):
    prompt = {"prompt_token_ids": list(range(100, 200))}
    order = CaptureOrder((POINT,), (0,))
    generate(llm, params(), prompt)
    assert generate(llm, params(), prompt).num_cached_tokens == 96
    mine = params(Ticket("key", capture=order))
    assert generate(llm, mine, prompt).num_cached_tokens == 0
    assert mine.skip_reading_prefix_cache is False  # the caller's own parameters stay
    assert generate(llm, params(steering(capture=order)), prompt).num_cached_tokens == 0


def test_a_steered_request_may_read_the_cache(core):
    made, _ = core.preprocess_add_request(request(steering()))
    assert made.skip_reading_prefix_cache is False


def test_the_sentence_names_the_budget_and_the_remedy(config):
    with pytest.raises(TooLarge, match="edit_rows") as caught:
        check_request(request(steering(rows=9)), config)
    assert (caught.value.code, caught.value.param) == ("too_many_edit_rows", "/interventions")


def test_an_invalid_option_is_named(config):
    config.additional_config = {"steer": {"edit_rows": 0}}
    with pytest.raises(SpecError, match="edit_rows"):
        check_request(request(steering()), config)


def test_checking_twice_changes_nothing(llm):
    before = (InputProcessor.process_inputs, EngineCore.preprocess_add_request)
    check_tickets(lambda ticket, config: pytest.fail("the first one stays"))
    assert (InputProcessor.process_inputs, EngineCore.preprocess_add_request) == before


@pytest.mark.parametrize(
    ("owner", "name"),
    [(InputProcessor, "process_inputs"), (EngineCore, "preprocess_add_request")],
)
def test_an_unknown_signature_is_refused_by_name_and_version(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda self, other: None)
    with pytest.raises(Unsupported, match=rf"in vLLM \d.*{name} takes"):
        check_tickets()


USERS = Selection(roles=frozenset({"user"}))


@pytest.mark.parametrize(
    "roles", [None, RoleRanges(9, ((1, 3, "user"),))], ids=["none", "of another prompt"]
)
def test_roles_are_those_of_the_prompt_or_the_request_is_refused(config, roles):
    ticket = steering(selections=(USERS,), roles=roles)
    with pytest.raises(SpecError) as caught:
        check_request(request(ticket), config)
    assert caught.value.code == "no_messages"
    whole = steering(selections=(USERS,), roles=RoleRanges(len(PROMPT), ((1, 3, "user"),)))
    assert check_request(request(whole), config) == whole
