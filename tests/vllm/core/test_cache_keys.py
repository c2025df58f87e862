"""Which cached blocks requests share, with vLLM's own requests and hashes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize, get_request_block_hasher
from vllm.v1.request import Request
from vllm.v1.simple_kv_offload import manager as offload_manager

from steer.engines.vllm.core import cache_keys
from steer.engines.vllm.core.cache_keys import assert_forked, fork_block_keys, ticket_of
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.errors import EngineError, SpecError, Unsupported
from steer.model import HookPoint
from steer.plan.file import selection_from_json, selection_to_json
from steer.plan.selection import EVERYWHERE, Counted, Ramp, Selection, TokenReader, resolve
from steer.prompts.roles import RoleRanges
from steer.spec import Where

NAME = "generate_block_hash_extra_keys"
BLOCK = 32
PROMPT = list(range(1000, 1100))  # three full blocks and four tokens
ANSWER = list(range(2000, 2060))  # with the prompt: 160 tokens, five full blocks
ON_PROMPT = Selection(phases=frozenset({"prompt"}))
ON_GENERATION = Selection(phases=frozenset({"generation"}))


@pytest.fixture(scope="module", autouse=True)
def _forked():
    original = vars(kv_cache_utils)[NAME]
    kv_cache_utils.init_none_hash(sha256)
    fork_block_keys()
    yield
    for module in (kv_cache_utils, block_pool, offload_manager):
        setattr(module, NAME, original)


def steering(*selections: Selection, fingerprint: str = "one", **fields) -> Ticket:
    fields = {"plan": fingerprint.encode().hex().rjust(64, "0"), **fields}
    return Ticket("key", fingerprint=fingerprint, selections=selections, **fields)


def request(prompt: Sequence[int], ticket: Ticket | None = None, *, block=BLOCK, **fields):
    extra = None if ticket is None else ticket.as_extra_args()
    params = SamplingParams(max_tokens=512, extra_args=extra)
    hasher = get_request_block_hasher(block, sha256)
    return Request("id", list(prompt), params, None, block_hasher=hasher, **fields)


def answered(prompt, ticket=None, answer=ANSWER, **fields):
    made = request(prompt, ticket, **fields)
    for token in answer:
        made.append_output_token_ids(token)
    return made


def shared(one, other) -> int:
    """How many tokens the second request finds in the cache that the first one filled."""
    found = 0
    for mine, theirs in zip(one.block_hashes, other.block_hashes, strict=False):
        if mine != theirs:
            break
        found += 1
    assert not set(one.block_hashes[found:]) & set(other.block_hashes[found:])
    return found * BLOCK


@pytest.mark.parametrize("turned", [False, True], ids=["plain first", "steered first"])
def test_all_steered_shares_nothing_with_plain(turned):
    pair = [answered(PROMPT), answered(PROMPT, steering(EVERYWHERE))]
    assert shared(*(reversed(pair) if turned else pair)) == 0


@pytest.mark.parametrize("turned", [False, True], ids=["plain first", "steered first"])
def test_generation_steered_shares_the_prompt_with_plain(turned):
    pair = [answered(PROMPT), answered(PROMPT, steering(ON_GENERATION))]
    assert shared(*(reversed(pair) if turned else pair)) == 96


def test_the_next_turn_without_steering_shares_the_first_prompt_only():
    first = answered(PROMPT, steering(ON_GENERATION))
    assert shared(first, request(PROMPT + ANSWER)) == 96


def test_the_next_turn_with_the_same_generation_steering_shares_the_first_prompt_only():
    # What was generated is prompt now, and so no longer steered.
    ticket = steering(ON_GENERATION)
    assert shared(answered(PROMPT, ticket), request(PROMPT + ANSWER, ticket)) == 96


def test_the_next_turn_steered_everywhere_shares_all():
    ticket = steering(EVERYWHERE)
    assert shared(answered(PROMPT, ticket), request(PROMPT + ANSWER, ticket)) == 160


def test_the_same_steering_twice_shares_all():
    ticket = steering(EVERYWHERE)
    assert shared(answered(PROMPT, ticket), answered(PROMPT, ticket)) == 160


FADE_OUT = Selection(ramp=Ramp(((0, 1.0), (200, 0.5))))
FADE_IN = Selection(ramp=Ramp(((0, 0.0), (40, 1.0))))


def test_a_ramp_gives_a_prompt_other_states_than_the_answer_that_it_was():
    ticket = steering(FADE_OUT)
    first = answered(PROMPT, ticket)
    assert shared(first, answered(PROMPT, ticket)) == 160
    # What was generated at a lower factor has the first one as a prompt; so has a shorter prompt's.
    assert shared(first, request(PROMPT + ANSWER, ticket)) == 96
    assert shared(answered(PROMPT[:40], ticket, PROMPT[40:]), answered(PROMPT, ticket)) == 32


def test_before_a_ramp_has_begun_and_once_it_is_over_states_are_as_without_it():
    assert shared(answered(PROMPT), answered(PROMPT, steering(FADE_IN))) == 96
    over = Selection(ramp=Ramp(((0, 1.0), (8, 0.0))), phases=frozenset({"generation"}))
    assert shared(answered(PROMPT), answered(PROMPT, steering(over))) == 96
    plain = answered(PROMPT + ANSWER, steering(over), answer=[])
    assert shared(plain, answered(PROMPT + ANSWER, answer=[])) == 160


def test_a_rule_that_does_not_select_a_token_has_no_factor_there():
    late = replace(FADE_OUT, ranges=((140, None),))
    one, other = steering(EVERYWHERE, late), steering(EVERYWHERE, late)
    first = answered(PROMPT, one)
    assert shared(first, answered(PROMPT[:90], other, PROMPT[90:] + ANSWER)) == 128


def test_other_steering_shares_nothing():
    one, other = steering(EVERYWHERE), steering(EVERYWHERE, fingerprint="other")
    assert shared(answered(PROMPT, one), answered(PROMPT, other)) == 0


def test_steered_prompt_and_plain_generation_are_not_a_longer_steered_prompt():
    ticket = steering(ON_PROMPT)
    first, second = answered(PROMPT, ticket), request(PROMPT + ANSWER, ticket)
    assert shared(first, second) == 96
    assert shared(second, first) == 96


def test_blocks_before_the_first_steered_token_are_everybodys():
    late = steering(Selection(ranges=((70, None),)))
    other = steering(Selection(ranges=((64, 65),)), fingerprint="other")
    assert shared(answered(PROMPT), answered(PROMPT, late)) == 64
    assert shared(answered(PROMPT, other), answered(PROMPT, late)) == 64


def test_a_trigger_is_found_where_its_token_is():
    ticket = steering(Selection(tokens=frozenset({2050})))
    first = answered(PROMPT, ticket)  # token 2050 is position 150
    assert shared(answered(PROMPT), first) == 128
    assert shared(first, answered(PROMPT, ticket)) == 160
    assert shared(first, request(PROMPT + ANSWER, ticket)) == 160


def test_a_trigger_that_never_comes_shares_all_with_plain():
    assert (
        shared(answered(PROMPT), answered(PROMPT, steering(Selection(tokens=frozenset({7})))))
        == 160
    )


def test_which_pass_selects_a_token_counts():
    first, second = Selection(ranges=((0, 32),)), Selection(ranges=((64, 96),))
    assert (
        shared(answered(PROMPT, steering(first, second)), answered(PROMPT, steering(second, first)))
        == 0
    )


def test_the_place_of_a_prompt_gate_is_part_of_the_key():
    # Both are selected from position 140 on; the gates were decided at 99 and at 119.
    gated = Selection(ranges=((140, None),), from_last_prompt_token=True)
    plain = Selection(ranges=((140, None),))
    early, late = answered(PROMPT, steering(gated)), answered(PROMPT, steering(plain))
    longer = answered(PROMPT + ANSWER[:20], steering(gated), ANSWER[20:])
    assert shared(early, longer) == 128
    assert shared(late, answered(PROMPT + ANSWER[:20], steering(plain), ANSWER[20:])) == 160
    assert shared(early, answered(PROMPT, steering(gated))) == 160


def test_a_gate_does_not_part_what_comes_before_it():
    ticket = steering(EVERYWHERE, Selection(from_last_prompt_token=True))
    assert shared(request(PROMPT, ticket), request(PROMPT + ANSWER, ticket)) == 96


@pytest.mark.parametrize("selection", [EVERYWHERE, ON_GENERATION], ids=["all", "generated"])
def test_the_tokens_that_a_prompt_gate_pools_are_computed_for_each_request(selection):
    """Scores lie in no block: 90 to 99 are read, whatever is selected, so the third block is
    shared with nobody; of the fourth, which the answer fills, all is the request's own."""
    gated = replace(selection, from_last_prompt_token=True)
    for last, found in ((10, 64), (4, 96), (2, 96), (200, 0)):
        ticket = steering(gated, pooled=(last,))
        first = answered(PROMPT, ticket)
        assert shared(answered(PROMPT), first) == found
        assert shared(first, answered(PROMPT, ticket)) == found


def test_from_the_first_token_that_a_pooled_gate_reads_blocks_are_the_requests_own():
    late = Selection(ranges=((70, None),))
    for ticket, found in (
        (steering(late, pooled=(3,)), 64),
        (steering(ON_GENERATION, pooled=(3,)), 96),
        (steering(EVERYWHERE, pooled=(3,)), 0),
        (steering(EVERYWHERE, late, pooled=(1, 3)), 64),
    ):
        assert shared(answered(PROMPT, ticket), answered(PROMPT, ticket)) == found


def test_what_a_request_leaves_behind_is_no_part_of_the_key():
    one = steering(EVERYWHERE)
    point = HookPoint(1, "resid_post")
    other = Ticket(
        "another",
        3,
        one.fingerprint,
        one.plan,
        5,
        one.selections,
        True,
        CaptureOrder((point,), (3,)),
    )
    assert shared(answered(PROMPT, one), answered(PROMPT, other)) == 160


def test_a_ticket_that_only_reads_shares_all_with_plain():
    reading = Ticket("key", capture=CaptureOrder((HookPoint(1, "resid_post"),), (3,)))
    assert shared(answered(PROMPT), answered(PROMPT, reading)) == 160


def test_a_fingerprint_on_another_plan_shares_nothing():
    forged = steering(EVERYWHERE, plan="f" * 64)
    assert shared(answered(PROMPT, steering(EVERYWHERE)), answered(PROMPT, forged)) == 0


def test_the_keys_of_vllm_stay():
    ticket = steering(EVERYWHERE)
    salted = answered(PROMPT, ticket, cache_salt="salt")
    keys, _ = kv_cache_utils.generate_block_hash_extra_keys(salted, 0, BLOCK, 0)
    assert keys[0] == ("cache_salt", "salt")
    assert keys[1][0] == "steer"
    assert shared(salted, answered(PROMPT, ticket)) == 0


def test_events_publish_the_key():
    made = request(PROMPT, steering(ON_GENERATION))
    made.append_output_token_ids(ANSWER)
    keys = [block_pool.generate_block_hash_extra_keys(made, s, s + 32, 0)[0] for s in (64, 96)]
    (plain, steered) = kv_cache_utils.to_event_extra_keys(keys)
    assert plain is None
    assert steered[0].startswith("one:")


def test_a_preempted_request_keeps_its_keys():
    made = answered(PROMPT, steering(ON_GENERATION))
    before = list(made.block_hashes)
    made.block_hashes.clear()  # more than vLLM does
    made.num_computed_tokens = 0
    made.update_block_hashes()
    assert made.block_hashes == before


def test_keys_at_a_finer_grain_name_coarser_blocks():
    def coarse(*fields):
        return BlockHashListWithBlockSize(answered(*fields, block=8).block_hashes, 8, BLOCK)

    plain, steered = coarse(PROMPT), coarse(PROMPT, steering(Selection(ranges=((70, 71),))))
    assert [a == b for a, b in zip(plain, steered, strict=True)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_block_may_be_asked_for_again_and_out_of_order():
    ticket = steering(Selection(ranges=((32, 50), (130, None))))
    made = answered(PROMPT, ticket)
    make = kv_cache_utils.generate_block_hash_extra_keys
    fresh = request(PROMPT, ticket, block=1024)
    fresh.append_output_token_ids(ANSWER)
    starts = range(0, 160, BLOCK)
    in_order = [make(made, s, s + BLOCK, 0)[0] for s in starts]
    backwards = [make(fresh, s, s + BLOCK, 0)[0] for s in reversed(starts)]
    assert in_order == backwards[::-1]
    assert in_order[0] is None
    assert None not in in_order[1:]


def test_the_ticket_is_parsed_once(monkeypatch):
    made = request(PROMPT, steering(EVERYWHERE))
    monkeypatch.setattr(Ticket, "of", staticmethod(lambda _: pytest.fail("parsed again")))
    made.append_output_token_ids(ANSWER)
    assert ticket_of(made) == steering(EVERYWHERE)


def test_a_malformed_ticket_raises():
    params = SamplingParams(max_tokens=1, extra_args={"steer": "{}"})
    with pytest.raises(SpecError, match="not a ticket"):
        ticket_of(Request("id", PROMPT, params, None))


# Every pair of requests: what they share, against a plain definition


def selections() -> st.SearchStrategy[Selection]:
    """Everything in one of `Selection`, and conditions that leave something selected."""
    phases = [frozenset({"prompt"}), frozenset({"generation"})]
    ranges = st.tuples(st.integers(-8, 16), st.none() | st.integers(-2, 24))
    plain = st.builds(
        Selection,
        phases=st.none() | st.sampled_from(phases),
        ranges=st.none() | st.lists(ranges, min_size=1, max_size=2).map(tuple),
        tokens=st.none() | st.sampled_from([frozenset({0}), frozenset({0, 1})]),
        from_last_prompt_token=st.booleans(),
    )
    some = st.builds(lambda start: Selection(ranges=((start, None),)), st.integers(0, 16))
    excluding = st.builds(
        lambda out, late: Selection(
            excluded=replace(out, from_last_prompt_token=False), from_last_prompt_token=late
        ),
        plain,
        st.booleans(),
    )
    return some | plain | excluding


def tickets() -> st.SearchStrategy[Ticket]:
    return st.builds(
        lambda chosen, name: steering(*chosen, fingerprint=name),
        st.lists(selections(), min_size=1, max_size=2),
        st.sampled_from(["one", "two"]),
    )


@st.composite
def pairs(draw):
    """Two requests over the same tokens, or nearly, each cut somewhere into prompt and answer."""
    tokens = draw(st.lists(st.integers(0, 2), min_size=8, max_size=24))
    ticket = draw(tickets())
    kin = replace(ticket, key="kin", measure=True)
    made = []
    for theirs in (ticket, draw(st.sampled_from([kin, kin, kin, None, draw(tickets())]))):
        mine = list(tokens)
        if draw(st.integers(0, 7)) == 0:
            mine[draw(st.integers(0, len(mine) - 1))] = 2
        prompt = draw(st.integers(1, len(mine)))
        stops = sorted({prompt, len(mine), draw(st.integers(prompt, len(mine)))})
        made.append((mine, prompt, stops, theirs))
    return made


def state(tokens, prompt, ticket, end):
    """All that the states of the first `end` tokens depend on."""
    if ticket is None:
        return (tokens[:end],)
    positions, ids = np.arange(end), np.array(tokens[:end])
    masks = [one.mask(positions, prompt, ids) for one in ticket.selections]
    if not any(mask.any() for mask in masks):
        return (tokens[:end],)
    numbers = range(len(masks))
    gated = any(masks[n].any() and ticket.selections[n].from_last_prompt_token for n in numbers)
    pattern = tuple(tuple(n for n in numbers if masks[n][p]) for p in range(end))
    return (tokens[:end], ticket.fingerprint, pattern, prompt if gated else None)


@settings(max_examples=500)
@given(pairs())
def test_blocks_are_shared_exactly_where_tokens_and_steering_are_equal(pair):
    hashes = []
    for tokens, prompt, stops, ticket in pair:
        made = request(tokens[:prompt], ticket, block=4)
        for start, stop in pairwise(stops):
            made.append_output_token_ids(tokens[start:stop])
        assert len(made.block_hashes) == len(tokens) // 4
        hashes.append(made.block_hashes)
    (one, first, _, mine), (other, second, _, theirs) = pair
    for number, (a, b) in enumerate(zip(*hashes, strict=True)):
        end = 4 * (number + 1)
        equal = state(one, first, mine, end) == state(other, second, theirs, end)
        assert (a == b) == equal, (end, pair)


# The fork itself


def test_every_module_of_vllm_that_makes_keys_has_the_fork():
    forked = kv_cache_utils.generate_block_hash_extra_keys
    assert block_pool.generate_block_hash_extra_keys is forked
    assert offload_manager.generate_block_hash_extra_keys is forked
    assert get_request_block_hasher.__globals__[NAME] is forked
    assert_forked()


def test_forking_twice_changes_nothing():
    forked = kv_cache_utils.generate_block_hash_extra_keys
    fork_block_keys()
    assert kv_cache_utils.generate_block_hash_extra_keys is forked


@pytest.mark.parametrize("module", [kv_cache_utils, block_pool, offload_manager])
def test_a_place_without_the_fork_is_named(monkeypatch, module):
    original = inspect.unwrap(kv_cache_utils.generate_block_hash_extra_keys)
    monkeypatch.setattr(module, NAME, original)
    with pytest.raises(EngineError, match=module.__name__):
        assert_forked()


def test_a_module_that_came_in_between_is_forked_next_time(monkeypatch):
    late = ModuleType("late")
    forked = kv_cache_utils.generate_block_hash_extra_keys
    vars(late)[NAME] = inspect.unwrap(forked)
    monkeypatch.setitem(sys.modules, "late", late)
    fork_block_keys()
    assert vars(late)[NAME] is forked


def test_an_unknown_signature_is_refused_by_name_and_version(monkeypatch):
    monkeypatch.setattr(kv_cache_utils, NAME, lambda request, block: None)
    with pytest.raises(Unsupported, match=rf"in vLLM \d.*{NAME} takes"):
        fork_block_keys()


def test_a_missing_function_is_refused_by_name_and_version(monkeypatch):
    monkeypatch.delattr(kv_cache_utils, NAME)
    with pytest.raises(Unsupported, match=rf"in vLLM \d.*{NAME} is not there"):
        fork_block_keys()


def text_selection(where) -> Selection:
    return resolve(Where.model_validate(where), TokenReader(vocabulary=vocabulary))


def vocabulary() -> list[bytes]:
    """The token 1050 is `<a>`, and 2010 its closing."""
    pieces = [b"x"] * 3000
    pieces[1050], pieces[2010] = b"<a>", b"</a>"
    return pieces


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch):
    """In the place of the plan store: plans by their hash."""
    plans: dict[str, tuple[Selection, ...]] = {}
    monkeypatch.setattr(cache_keys, "_of_plan", plans.__getitem__)
    return plans


@pytest.mark.parametrize(
    ("where", "plain"),
    [
        ({"after": ["<a>"]}, 32),
        ({"before": ["<a>"]}, 0),
        ({"between": [["<a>", "</a>"]]}, 32),
        ({"outside": [["<a>", "</a>"]]}, 0),
        ({"phases": ["generation"], "after": ["</a>"]}, 96),
    ],
    ids=str,
)
def test_what_was_said_after_a_text_is_shared_with_a_prompt_that_holds_it(stored, where, plain):
    """A text is met in prompt and answer alike; up to it, blocks are everybody's."""
    selection = text_selection(where)
    named = selection_from_json(selection_to_json(selection))
    ticket = steering(named)
    stored[ticket.plan] = (selection,)
    said = answered(PROMPT, ticket)
    assert shared(answered(PROMPT), said) == plain
    asked = request([*PROMPT, *ANSWER], ticket)
    whole = 160 if "phases" not in where else 96
    assert shared(said, asked) == whole
    # However often it is looked at, and in whatever order blocks are named again.
    assert shared(said, answered(PROMPT, ticket)) == 160


def test_requests_whose_messages_lie_elsewhere_share_up_to_the_first():
    selection = Selection(roles=frozenset({"user"}))
    early = replace(steering(selection), roles=RoleRanges(100, ((70, 90, "user"),)))
    late = replace(steering(selection), roles=RoleRanges(100, ((70, 80, "user"),)))
    one, other = answered(PROMPT, early), answered(PROMPT, late)
    assert shared(one, other) == 64
    assert shared(one, answered(PROMPT)) == 64
    assert shared(one, answered(PROMPT, replace(early, key="another"))) == 160


def test_every_other_token_is_another_pattern():
    every = steering(Selection(counted=Counted(2)))
    third = steering(Selection(counted=Counted(3)))
    assert shared(answered(PROMPT, every), answered(PROMPT, third)) == 96
    assert shared(answered(PROMPT, every), answered(PROMPT, every)) == 160
