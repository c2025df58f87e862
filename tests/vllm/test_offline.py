"""Steering in vLLM's own `LLM`, by the helper."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_specs
import pytest
import vllm_engine

from steer.engines.vllm.front.offline import Steered
from steer.engines.vllm.messages import read_receipt, take_off
from steer.errors import SpecError, SteerError
from steer.prompts.chat import OPEN, ChatForm
from steer.prompts.roles import chat_roles
from steer.registry.registry import Registry
from steer.registry.shipped import add_library
from steer.spec import parse_spec

FRENCH = {"interventions": [{"kind": "add", "vector": "french"}]}
QUESTION = [{"role": "user", "content": "What is in the park?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    os.environ["STEER_REGISTRY"] = str(folder)
    from vllm import LLM

    return LLM(**vllm_engine.OPTIONS)


@pytest.fixture(scope="module")
def steered(llm: Any, folder: Path) -> Iterator[Steered]:
    with Registry.open(folder) as registry:
        add_library(registry, vllm_engine.LIBRARY / "demo")
        demo_specs.register(registry)
        yield Steered(llm, library=registry)


CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}


def params(**fields: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 24, "temperature": 0, **fields})


def test_roles_are_those_of_the_chats_messages(steered: Steered) -> None:
    spec = {**FRENCH, "where": {"roles": ["user"]}}
    chats = [QUESTION, [*QUESTION, {"role": "assistant", "content": "Here."}, *QUESTION]]
    found = steered.chat(chats, params(), spec, use_tqdm=False)
    open_answer = steered.chat(chats[1][:2], params(), spec, use_tqdm=False, **CONTINUED)
    for messages, answer, form in (
        *((one, answer, OPEN) for one, answer in zip(chats, found, strict=True)),
        (chats[1][:2], open_answer[0], ChatForm(open_answer=False, continue_final=True)),
    ):
        spans = chat_roles(steered.engine.tokenizer, messages, form).ranges
        wanted = sum(end - start for start, end, role in spans if role == "user")
        assert answer.receipt is not None
        assert answer.receipt.tokens_steered == wanted > 0
    with pytest.raises(SpecError) as caught:
        steered.generate(["Where is it?"], params(), spec, use_tqdm=False)
    assert (caught.value.code, caught.value.param) == ("no_messages", "/where/roles")


def test_a_chat_is_steered_and_leaves_a_receipt(steered: Steered) -> None:
    plain, french = (
        steered.chat(QUESTION, params(), spec, use_tqdm=False)[0] for spec in (None, FRENCH)
    )
    assert plain.receipt is None
    assert plain.output.outputs[0].text != french.output.outputs[0].text
    assert french.receipt is not None
    fed = len(french.output.prompt_token_ids) + len(french.output.outputs[0].token_ids) - 1
    assert french.receipt.tokens_steered + french.receipt.tokens_skipped == fed
    assert french.receipt.tokens_steered == 1  # the shipped vector acts on the last prompt token


def test_a_receipt_comes_with_the_engines_last_output(steered: Steered, llm: Any) -> None:
    plan = steered.plans.plan(parse_spec(FRENCH))
    ticket = steered.engine.tickets.issue(plan, attached=True)
    prompt = steered.chat(QUESTION, params(), FRENCH, use_tqdm=False)[0].output.prompt_token_ids
    asked = params(extra_args=ticket.as_extra_args())
    (output,) = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
    found = take_off(output)
    assert found is not None
    fed, answer = found
    assert fed == len(prompt) + len(output.outputs[0].token_ids) - 1
    assert read_receipt(answer).tokens_steered == 1
    again = llm.collective_rpc("steer_receipts", args=([(ticket.key, {0: fed})],))
    assert "error" in again[0][0][0]  # nothing is kept of what was told


def test_prompts_may_have_a_spec_each_and_share_a_batch(steered: Steered) -> None:
    prompts = ["the cat", "the dog", "a house"]
    specs = [demo_specs.SPECS["everything"], None, demo_specs.SPECS["a clamp that competes"]]
    together = steered.generate(prompts, params(ignore_eos=True), specs, use_tqdm=False)
    for prompt, spec, answer in zip(prompts, specs, together, strict=True):
        alone = steered.generate(prompt, params(ignore_eos=True), spec, use_tqdm=False)[0]
        assert alone.output.outputs[0].token_ids == answer.output.outputs[0].token_ids
        assert (answer.receipt is None) == (spec is None)


def test_choices_add_up_in_one_receipt(steered: Steered) -> None:
    spec = demo_specs.SPECS["everything"]
    chosen = params(n=3, temperature=0.8, seed=5, ignore_eos=True)
    answer = steered.generate("the cat sat", chosen, spec, full_receipt=True, use_tqdm=False)[0]
    prompt = len(answer.output.prompt_token_ids)
    fed = sum(prompt + len(choice.token_ids) - 1 for choice in answer.output.outputs)
    assert len(answer.output.outputs) == 3
    assert answer.receipt is not None
    assert answer.receipt.tokens_steered == fed
    assert all(point.relative_size for point in answer.receipt.hook_points)


def test_stop_strings_leave_an_exact_receipt(steered: Steered) -> None:
    spec = demo_specs.SPECS["everything"]
    free = steered.generate("the cat sat", params(ignore_eos=True), spec, use_tqdm=False)[0]
    text = free.output.outputs[0].text
    stop = text[len(text) // 3 : len(text) // 3 + 4]
    answer = steered.generate("the cat sat", params(stop=[stop]), spec, use_tqdm=False)[0]
    assert answer.output.outputs[0].finish_reason == "stop"
    fed = len(answer.output.prompt_token_ids) + len(answer.output.outputs[0].token_ids) - 1
    assert answer.receipt is not None
    assert answer.receipt.tokens_steered == fed


def test_a_concept_reads_its_text_with_the_served_model(steered: Steered) -> None:
    item = {"kind": "concept", "sae": "resid-3", "text": "music", "strength": 3, "explain": True}
    spec = {"interventions": [item]}
    answer = steered.generate("the cat sat", params(ignore_eos=True), spec, use_tqdm=False)[0]
    assert answer.receipt is not None
    assert answer.receipt.tokens_steered > 0
    ((told),) = answer.receipt.concepts
    assert told["intervention"] == 0
    assert all({"feature", "label", "value"} == one.keys() for one in told["features"])
    assert told["features"][0]["value"] > 0


def test_what_is_wrong_is_named(steered: Steered) -> None:
    with pytest.raises(SteerError, match="no vector named 'frnch'"):
        steered.chat(QUESTION, params(), {"interventions": [{"kind": "add", "vector": "frnch"}]})
    with pytest.raises(SteerError, match="1 prompts, 1 params and 2 specs"):
        steered.chat(QUESTION, params(), [FRENCH, None])
    with pytest.raises(SteerError, match="steer a request already"):
        steered.params(steered.params(params(), FRENCH), FRENCH)
    with pytest.raises(SteerError, match="not a ticket"):
        steered.receipts([None], [params(extra_args={"steer": "{}"})])
