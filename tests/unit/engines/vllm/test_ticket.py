"""Tickets: what they carry, and how often it is read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from artefacts import span_vocabulary

from steer.engines.vllm import ticket as module
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.errors import SpecError
from steer.model import HookPoint
from steer.plan.selection import EVERYWHERE, Counted, Selection
from steer.plan.texts.automaton import compile_automaton
from steer.plan.texts.condition import TextCondition
from steer.prompts.roles import RoleRanges

SELECTIONS = (
    EVERYWHERE,
    Selection(frozenset({"prompt"}), ((0, 3), (-1, None)), frozenset({5, 7}), EVERYWHERE, True),
)
TEXTS = Selection(
    roles=frozenset({"user"}),
    counted=Counted(2, 9, 4),
    texts=(
        TextCondition("after", (compile_automaton("<a>", None, span_vocabulary()),)),
        TextCondition("outside", (compile_automaton("<", (3, 4), span_vocabulary()),)),
    ),
)
ROLES = RoleRanges(9, ((1, 3, "system"), (4, 9, "user")))
STEERED = Ticket("a", 2, "print", "0" * 64, 3, SELECTIONS, measure=True)
ORDER = CaptureOrder((HookPoint(1), HookPoint(0, "mlp_out")), (0, 4))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of texts that are read, with nothing remembered at the beginning."""
    for function in (module._read, module._steering, module._written):
        function.cache_clear()
    texts: list[str] = []

    def loads(text: str) -> Any:
        found = json.loads(text)
        texts.append("ticket" if "key" in found else "plan")
        return found

    monkeypatch.setattr(module, "json", type("json", (), {"loads": loads, "dumps": json.dumps}))
    return texts


@pytest.mark.parametrize(
    "ticket",
    [
        Ticket("a"),
        STEERED,
        replace(STEERED, selections=(), measure=False),
        Ticket("b", capture=ORDER),
        replace(STEERED, capture=ORDER),
        replace(STEERED, selections=(TEXTS,), roles=ROLES),
    ],
)
def test_a_ticket_says_the_same_at_the_other_end(ticket: Ticket) -> None:
    found = Ticket.of(ticket.as_extra_args())
    assert found == ticket
    assert found is not None
    assert found.capture == ticket.capture
    assert Ticket.of(None) is Ticket.of({}) is None


def test_a_ticket_is_read_once_in_a_process(read: list[str]) -> None:
    extra = STEERED.as_extra_args()
    assert len({id(Ticket.of(extra)) for _ in range(4)}) == 1
    assert read == ["ticket", "plan"]


def test_what_a_plan_says_is_read_once_for_all_its_requests(read: list[str]) -> None:
    found = [Ticket.of(replace(STEERED, key=str(n)).as_extra_args()) for n in range(20)]
    assert read.count("plan") == 1
    assert len({id(one.selections) for one in found if one}) == 1
    assert module._written.cache_info().misses == 1


def test_a_long_ticket_is_read_and_not_kept(read: list[str]) -> None:
    order = CaptureOrder((HookPoint(0),), tuple(range(module._SHORT)))
    extra = Ticket("long", capture=order).as_extra_args()
    assert Ticket.of(extra) == Ticket.of(extra)
    assert read == ["ticket", "ticket"]


@pytest.mark.parametrize(
    "change",
    [
        {"v": 1},
        {"steering": {}},
        {"steering": "{}}"},
        {"steering": json.dumps({"plan": "../../etc"})},
        {"steering": json.dumps({"selections": [{}] * 9})},
        {"steering": json.dumps({"selections": [{"phases": ["night"]}]})},
        {"n": "many"},
        {"roles": [9, [[3, 12, "user"]]]},
        {"roles": [9, [[3, 5, "bot"]]]},
        {"capture": {"points": [[0]], "positions": []}},
    ],
    ids=str,
)
def test_what_is_no_ticket_is_refused_every_time(change: dict[str, Any]) -> None:
    content = json.loads(STEERED.as_extra_args()["steer"]) | change
    for _ in range(2):
        with pytest.raises(SpecError) as caught:
            Ticket.of({"steer": json.dumps(content)})
        assert caught.value.code == "invalid_ticket"


@pytest.mark.parametrize("text", [7, [], {}, "[]", "null", b"{}"], ids=repr)
def test_what_is_no_text_of_a_ticket_is_refused(text: Any) -> None:
    with pytest.raises(SpecError, match="not a ticket"):
        Ticket.of({"steer": text})
